"""`featstore info` and `featstore ls`: what a store holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cli.common import json_option, print_json, store_option
from cli.tables import count, facts, size, table
from featstore.remote.location import find_mirror, shown

_DATASETS = """
select
    dataset, format, licence, spec, count(item) as items,
    (select list(distinct split order by split)
     from (select unnest(splits) as split from items as i where i.dataset = datasets.dataset)
    ) as splits
from datasets left join items using (dataset)
group by dataset, format, licence, spec
order by dataset
"""

_TAPS = """
select
    feature_set, name, backbone, dtype, is_foreign, shard_rows, tap, dim, grid_h, grid_w, n_prefix,
    count(ledger."row") filter (where status = 'ok') as n_rows,
    count(ledger."row") filter (where status <> 'ok') as n_rejected
from feature_sets
left join taps using (feature_set)
left join (
    select * from ledger anti join tombstones using (feature_set, "row")
) as ledger using (feature_set, tap)
group by all
order by feature_set, tap
"""
_SET_COLUMNS = ("feature_set", "name", "backbone", "dtype", "is_foreign", "shard_rows")
_TAP_COLUMNS = ("tap", "dim", "grid_h", "grid_w", "n_prefix", "n_rows", "n_rejected")


@click.command()
@click.argument("feature_set", required=False, metavar="[FEATURE_SET]")
@store_option
@json_option
def info(feature_set: str | None, store_path: Path, as_json: bool) -> None:
    """Show what a store holds, or what one FEATURE_SET of it was made with.

    FEATURE_SET is a key, the start of one, or a name.

    \b
    Example:
        featstore info
        featstore info dinov2_b@224 --json
    """
    if feature_set is not None:
        found = _feature_set_facts(store_path, feature_set)
        if as_json:
            print_json(found)
        else:
            click.echo(facts(_flat(found)))
        return
    found = _store_facts(store_path)
    if as_json:
        print_json(found)
        return
    shown = {name: found[name] for name in ("store", "format", "library", "runs")}
    click.echo(facts({**shown, "size": size(found["bytes"])}))
    columns = ["data set", "format", "items", "splits", "licence"]
    keys = ("dataset", "format", "items", "splits", "licence")
    click.echo("\n" + table(columns, [[one[key] for key in keys] for one in found["datasets"]]))
    click.echo("\n" + _feature_sets_table(found["feature_sets"]))


@click.command()
@store_option
@json_option
def ls(store_path: Path, as_json: bool) -> None:
    """List the feature sets of a store with their taps, rows and sizes.

    \b
    Example:
        featstore ls
        featstore ls --store /data/features.zarr --json
    """
    found = _feature_sets(store_path)
    if as_json:
        print_json({"feature_sets": found})
    else:
        click.echo(_feature_sets_table(found))


def _store_facts(store_path: Path) -> dict[str, Any]:
    from featstore.index import query
    from featstore.store import read_attributes

    datasets = query(store_path, _DATASETS).to_pylist()
    n_runs = query(store_path, "select count(*) as n from runs")["n"][0].as_py()
    about = read_attributes(store_path)
    feature_sets = _feature_sets(store_path)
    return {
        "store": shown(store_path),
        "format": about["format"],
        "library": about["library"],
        "runs": n_runs,
        "bytes": _bytes_below(store_path)
        + sum(_bytes_behind(store_path, each) for each in feature_sets),
        "datasets": datasets,
        "feature_sets": feature_sets,
    }


def _feature_sets(store_path: Path) -> list[dict[str, Any]]:
    """List feature sets, each with its taps and the blocks of its tail."""
    from featstore.index import query
    from featstore.store import FeatureSetFolder
    from featstore.tail_file import find_tail

    found: dict[str, dict[str, Any]] = {}
    for line in query(store_path, _TAPS).to_pylist():
        key = line["feature_set"]
        entry = found.setdefault(key, {**{name: line[name] for name in _SET_COLUMNS}, "taps": []})
        if line["tap"] is not None:
            entry["taps"].append({name: line[name] for name in _TAP_COLUMNS})
    for key, entry in found.items():
        entry["taps"].sort(key=_tap_order)
        entry["rows"] = max((tap["n_rows"] for tap in entry["taps"]), default=0)
        entry["bytes"] = _bytes_below(store_path / "feature_sets" / key)
        entry["bytes"] += _bytes_behind(store_path, entry)
        tail = find_tail(FeatureSetFolder(store_path / "feature_sets" / key))
        entry["tail"] = 0 if tail is None else tail.n_blocks
    return list(found.values())


def _tap_order(tap: Mapping[str, Any]) -> tuple[bool, int, str]:
    from featstore.taps import parse_tap

    parsed = parse_tap(tap["tap"])
    return (parsed.index is None, parsed.index or 0, tap["tap"])


def _feature_sets_table(feature_sets: Sequence[Mapping[str, Any]]) -> str:
    columns = ["feature set", "name", "dtype", "rows", "size", "tail", "taps"]
    lines = [
        [
            one["feature_set"],
            one["name"],
            one["dtype"],
            f"{one['rows']:,}",
            size(one["bytes"]),
            one["tail"] or "",
            " ".join(_tap_text(tap, one["rows"]) for tap in one["taps"]),
        ]
        for one in feature_sets
    ]
    return table(columns, lines)


def _tap_text(tap: Mapping[str, Any], n_rows: int) -> str:
    """Name a tap, with its rows where it has fewer than others."""
    return tap["tap"] if tap["n_rows"] == n_rows else f"{tap['tap']} ({tap['n_rows']:,} rows)"


def _feature_set_facts(store_path: Path, text: str) -> dict[str, Any]:
    from featstore.feature_sets import find_feature_set
    from featstore.store import open_folder

    folder = find_feature_set(open_folder(store_path), text)
    [listed] = [each for each in _feature_sets(store_path) if each["feature_set"] == folder.key]
    recorded = folder.attributes
    return {
        **listed,
        "plan": recorded["plan"],
        "identity": recorded["backbone"],
        "provenance": recorded["provenance"],
    }


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give a feature set's facts one a line: taps by shape, the plan and provenance by field."""
    shown = {
        "feature set": found["feature_set"],
        "name": found["name"],
        "rows": f"{found['rows']:,}",
        "size": size(found["bytes"]),
    }
    for tap in found["taps"]:
        grid = "" if tap["grid_h"] is None else f"{tap['grid_h']}x{tap['grid_w']} of "
        prefix = f" and {count(tap['n_prefix'], 'prefix token')}" if tap["n_prefix"] else ""
        shown[f"tap {tap['tap']}"] = f"{grid}{tap['dim']}{prefix}, {count(tap['n_rows'], 'row')}"
    if found["tail"]:
        shown["tail"] = f"last {count(found['tail'], 'block')} and the final norm"
    for name, value in (found["plan"] or {"plan": "none: imported features"}).items():
        shown[f"plan.{name}" if found["plan"] else name] = value
    for name, value in found["provenance"].items():
        shown[f"provenance.{name}"] = value
    return shown


def _bytes_behind(store_path: Path, entry: Mapping[str, Any]) -> int:
    """Count the bytes of a feature set's rows where they lie behind a URL, and not here."""
    from featstore.store import FeatureSetFolder

    if find_mirror(store_path) is None:
        return 0
    folder = FeatureSetFolder(store_path / "feature_sets" / entry["feature_set"])
    itemsize = folder.store_dtype.itemsize
    return sum(
        tap["n_rows"] * folder.taps[tap["tap"]].bytes_per_row(itemsize) for tap in entry["taps"]
    )


def _bytes_below(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

"""Whether what two stores hold can lie in one: told before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from featstore import index
from featstore.errors import InvalidInputError
from featstore.hashing import canonical_json, short_key
from featstore.items import read_dataset, read_items
from featstore.labels import THUMBNAIL, label_digests, label_kinds
from featstore.store import StoreFolder

_FOR_PEOPLE = ("name", "licence")  # of a backbone's identity
_NAMED = 5  # contradictions told at once
# Of imported features the key says little of the numbers, so that these are compared.
_STATISTICS = """
select rows.image_key, rows.crop, rows."view", ledger.tap, ledger.abs_max, ledger."mean",
    ledger."std"
from (select distinct "row" from samples where feature_set = $key) as live
inner join rows on rows.feature_set = $key and rows."row" = live."row"
inner join ledger on ledger.feature_set = $key and ledger."row" = live."row"
where ledger.status = 'ok'
order by all
"""
Wanted = Mapping[str, Collection[str]]
"""Data set -> items."""


@dataclass(kw_only=True, slots=True)
class Holding:
    """What stores hold, as far as it may contradict another one."""

    about: dict[str, dict[str, Any]] = field(default_factory=dict)  # by data set
    items: dict[str, dict[str, str]] = field(default_factory=dict)  # item -> hash of its line
    paths: dict[str, str] = field(default_factory=dict)  # item -> path, for messages
    labels: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)  # item -> digest
    feature_sets: dict[str, dict[str, Any]] = field(default_factory=dict)  # attributes by key
    imported: dict[str, dict[tuple[str, ...], str]] = field(default_factory=dict)  # row's hash
    runs: dict[str, str] = field(default_factory=dict)  # run -> hash of its record


def read_holding(
    store: StoreFolder,
    *,
    wanted: Wanted | None = None,
    keys: Collection[str] | None = None,
    runs: bool = True,
) -> Holding:
    """Read what a store holds.

    Args:
        store: Store.
        wanted: Items to look at; None: all.
        keys: Feature sets to look at; None: all.
        runs: Look at the runs too.
    """
    found = Holding()
    for dataset in store.datasets() if wanted is None else sorted(wanted):
        found.about[dataset] = read_dataset(store, dataset)
        chosen = None if wanted is None else set(wanted[dataset])
        own = found.items.setdefault(dataset, {})
        for line in read_items(store, dataset).to_pylist():
            if chosen is None or line["item"] in chosen:
                own[line["item"]] = short_key(line)
                found.paths[line["item"]] = line["path"]
        for kind in label_kinds(store, dataset):
            digests = label_digests(store, dataset, kind)
            found.labels[dataset, kind] = {i: d for i, d in digests.items() if i in own}
    for key in store.feature_set_keys() if keys is None else keys:
        found.feature_sets[key] = store.feature_set(key).attributes
        if found.feature_sets[key]["plan"] is None:
            found.imported[key] = _statistics(store, key)
    for path in store.runs_path.glob("*/run.json") if runs else ():
        found.runs[path.parent.name] = _record_hash(path.read_bytes())
    return found


def _record_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _statistics(store: StoreFolder, key: str) -> dict[tuple[str, ...], str]:
    table = index.query(store.path, _STATISTICS, {"key": key}, timeout_s=600.0)
    found: dict[tuple[str, ...], str] = {}
    for line in table.to_pylist():
        names = ("image_key", "crop", "view", "tap")
        numbers = [repr(line[name]) for name in ("abs_max", "mean", "std")]
        found[tuple(line[name] for name in names)] = " ".join(numbers)
    return found


def check_join(one: Holding, other: Holding) -> None:
    """Refuse two holdings that contradict each other.

    Raises:
        InvalidInputError: They do; the message names the first contradictions.
    """
    found = list(islice(_contradictions(one, other), _NAMED))
    if found:
        raise InvalidInputError(
            "These stores cannot be joined, and nothing was written: "
            f"{'; '.join(found)}. Keep them apart, or `featstore copy` the part that fits."
        )


def join(one: Holding, other: Holding) -> None:
    """Add what `other` holds to `one`; check it before."""
    one.about = {**other.about, **one.about}
    for dataset, items in other.items.items():
        one.items.setdefault(dataset, {}).update(items)
    one.paths.update(other.paths)
    for place, digests in other.labels.items():
        one.labels.setdefault(place, {}).update(digests)
    one.feature_sets = {**other.feature_sets, **one.feature_sets}
    for key, lines in other.imported.items():
        one.imported.setdefault(key, {}).update(lines)
    one.runs.update(other.runs)


def _contradictions(one: Holding, other: Holding) -> Iterator[str]:
    for dataset in sorted(one.about.keys() & other.about.keys()):
        yield from _data_set(one, other, dataset)
    for key in sorted(one.feature_sets.keys() & other.feature_sets.keys()):
        fields = _differing(one.feature_sets[key], other.feature_sets[key])
        if fields:
            yield f"feature set {key} has another {' and another '.join(fields)} in each"
        mine, theirs = one.imported.get(key, {}), other.imported.get(key, {})
        rows = sorted(row for row in mine.keys() & theirs.keys() if mine[row] != theirs[row])
        if rows:
            yield (
                f"imported feature set {key} has other numbers in each for {len(rows)} rows "
                f"(the first: image {rows[0][0]}, tap {rows[0][3]})"
            )
    for run_id in sorted(one.runs.keys() & other.runs.keys()):
        if one.runs[run_id] != other.runs[run_id]:
            yield f"run {run_id} is another one in each"


def _data_set(one: Holding, other: Holding, dataset: str) -> Iterator[str]:
    mine, theirs = one.about[dataset], other.about[dataset]
    common = one.items[dataset].keys() & other.items[dataset].keys()
    for name in ("format", "classes", "skeleton"):
        if mine.get(name) != theirs.get(name):
            yield f"data set {dataset!r} has another {name} in each"
            return
    # Moved folders keep the paths of their items; strangers of one name share none.
    if mine["spec"] != theirs["spec"] and not common:
        yield f"two data sets are named {dataset!r} ({mine['spec']} and {theirs['spec']})"
        return
    for item in sorted(common, key=lambda item: one.paths[item]):
        if one.items[dataset][item] != other.items[dataset][item]:
            yield f"item {one.paths[item]} of data set {dataset!r} is another one in each"
    for place in sorted(one.labels.keys() & other.labels.keys()):
        own, new = one.labels[place], other.labels[place]
        if place[0] == dataset and place[1] != THUMBNAIL:
            for item in sorted(own.keys() & new.keys()):
                if own[item] != new[item]:
                    path = one.paths[item]
                    yield f"the {place[1]} label of {path} in {dataset!r} is another one in each"


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Name the attributes that must be equal and are not; sizes of shards may differ."""
    names = [
        name for name in ("dtype", "plan", "norm_sha256") if mine.get(name) != theirs.get(name)
    ]
    if _identity(mine) != _identity(theirs):
        names.append("backbone")
    taps = mine["taps"].keys() & theirs["taps"].keys()
    names += [f"tap {tap}" for tap in sorted(taps) if mine["taps"][tap] != theirs["taps"][tap]]
    tails = [_tail(one) for one in (mine, theirs)]
    if None not in tails and _depth(tails[0]) == _depth(tails[1]):
        names += ["tail"] if tails[0]["sha256"] != tails[1]["sha256"] else []
    return names


def _identity(attributes: Mapping[str, Any]) -> str:
    backbone = attributes["backbone"]
    return canonical_json({n: v for n, v in backbone.items() if n not in _FOR_PEOPLE})


def _tail(attributes: Mapping[str, Any]) -> Any:
    """Give the record of the stored tail; None: there is none, or it is being replaced."""
    records = attributes.get("tail") or [None]
    return records[0] if len(records) == 1 else None


def _depth(record: Mapping[str, Any]) -> int:
    return len(record["spec"]["blocks"])

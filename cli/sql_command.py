"""`featstore sql`: read-only questions to the index."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cli.common import json_option, plain, print_json, resumable, store_option
from cli.params import KeyValue
from cli.tables import table


@click.command()
@click.argument("query")
@click.option(
    "-p",
    "--param",
    "params",
    type=KeyValue(),
    multiple=True,
    help="Bind $KEY in the query; repeatable.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "csv", "json", "jsonl"]),
    default="table",
    show_default=True,
    help="How rows are printed.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up after this long.",
)
@store_option
@json_option
def sql(
    query: str,
    params: Sequence[tuple[str, str]],
    style: str,
    timeout_s: float,
    store_path: Path,
    as_json: bool,
) -> None:
    """Ask the index a question in SQL; QUERY is - to read it from stdin.

    Only select, describe, summarize and explain run, and only over the index: the tables
    datasets, items, feature_sets, taps, rows, shards, ledger, tombstones, runs, params, metrics
    and curves, and the view samples. It works while an extraction or a training run is writing.

    \b
    Example:
        featstore sql "select split, count(*) as images from samples group by split order by split"
        featstore sql 'select path from samples where split = $s order by row' -p s=test
        featstore sql "select run_id, value from metrics order by run_id, name" --format csv
    """
    from featstore.index import query as ask

    if query == "-":
        query = sys.stdin.read()
    with resumable("Nothing was changed."):
        bound = {name: _value(text) for name, text in params}
        found = ask(store_path, query, bound or None, timeout_s=timeout_s)
    columns, rows = found.column_names, found.to_pylist()
    if as_json:
        print_json({"columns": columns, "rows": rows})
    else:
        click.echo(rows_text(columns, rows, style), nl=False)


def _value(text: str) -> Any:
    """Read a number, true, false or null as JSON does; anything else stays text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def rows_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], style: str) -> str:
    """Write rows as a table, as CSV, as one JSON array, or as one JSON object a line."""
    if style == "json":
        return json.dumps(plain(rows), indent=2) + "\n"
    if style == "jsonl":
        return "".join(json.dumps(plain(row)) + "\n" for row in rows)
    values = ([row[name] for name in columns] for row in rows)
    return _csv(columns, values) if style == "csv" else table(columns, values) + "\n"


def _csv(columns: Sequence[str], values: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(values)
    return text.getvalue()

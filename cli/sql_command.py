"""`featstore sql`: read-only questions to the index."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cli.common import json_option, plain, print_json, resumable, store_option
from cli.tables import table


class Param(click.ParamType):
    """``NAME=VALUE``; a value that reads as a JSON number, true, false or null is that."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """Give the name and the value."""
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is no NAME=VALUE, such as split=test.", param, ctx)
        try:
            parsed = json.loads(text)
        except ValueError:
            return name, text
        return name, text if isinstance(parsed, list | dict) else parsed


@click.command()
@click.argument("query")
@click.option(
    "-p",
    "--param",
    "params",
    type=Param(),
    multiple=True,
    help="Bind $NAME in the query; repeatable.",
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
    params: Sequence[tuple[str, Any]],
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
        featstore sql "select run_id, value from metrics where name = 'rmse' order by value" --format csv
    """
    from featstore import index

    if query == "-":
        query = click.get_text_stream("stdin").read()
    with resumable("Nothing was changed."):
        found = index.query(store_path, query, dict(params) or None, timeout_s=timeout_s)
    columns, rows = found.column_names, found.to_pylist()
    if as_json:
        print_json({"columns": columns, "rows": rows})
    else:
        click.echo(rows_text(columns, rows, style), nl=False)


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

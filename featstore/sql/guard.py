"""What ad-hoc SQL may do: read the index, one statement at a time."""

from __future__ import annotations

import json
import re
from typing import Any

import duckdb

from featstore.errors import InvalidInputError

_EXPLAIN = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*explain\s+(?:analyze\s+)?(?:\([^)]*\)\s*)?", re.I | re.S
)
_ONLY = "Only one select, with, describe, summarize, show or explain statement can be asked."
_KIND = re.compile(r"^[A-Z]\w+(?: [A-Z]\w+)* Error: ")
_UNKNOWN_COLUMN = re.compile(
    r'Referenced column (".+?") (?:was )?not found.*?(?:Candidate bindings: (.*))?'
)
_EXPECTED = "`where` must be one SQL expression over the columns of samples."
_PLAIN = "select * from samples where true"
_REFUSED = {"SUBQUERY": "a subquery", "PARAMETER": "a parameter", "STAR": "a star"}


def check_query(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse anything but one statement that reads.

    Raises:
        InvalidInputError: It is none, several, or of another kind.
    """
    kind = duckdb.StatementType
    statements = _statements(con, sql)
    if len(statements) == 1 and statements[0].type == kind.EXPLAIN:
        # What is explained is checked by itself; `explain analyze` would run it.
        statements = _statements(con, _EXPLAIN.sub("", sql, count=1))
    if len(statements) != 1 or statements[0].type != kind.SELECT:
        raise InvalidInputError(f"{_ONLY} Got {_shown(sql)}.")


def check_where(con: duckdb.DuckDBPyConnection, where: str) -> None:
    """Refuse anything but one boolean SQL expression without a subquery.

    The text must parse to the same condition bare and in parentheses, so that no part of it can
    leave the parentheses that it is put in.

    Raises:
        InvalidInputError: It is something else.
    """
    bare = _condition(con, where, f"select * from samples where {where}\n")
    enclosed = _condition(con, where, f"select * from samples where ({where}\n)")
    if bare != enclosed:
        raise _no_condition(where)
    for found in sorted(_classes(bare)):
        if found in _REFUSED:
            raise InvalidInputError(
                f"`where` must not hold {_REFUSED[found]}. Got {_shown(where)}."
            )
    try:
        (kind,) = con.sql(f"select ({where}\n) from samples").types
    except duckdb.Error as error:
        raise InvalidInputError(f"{sentence(error)} Got {_shown(where)}.") from error
    if kind != "BOOLEAN":
        raise InvalidInputError(
            f"`where` must be true or false for each line. Got {_shown(where)}, of type {kind}."
        )


def sentence(error: duckdb.Error) -> str:
    """Give DuckDB's message as one line, without its kind and place; near names are kept."""
    text = str(error).split("\n\nLINE ")[0].split("\nLINE ")[0]
    text = _KIND.sub("", " ".join(text.split())).rstrip(".!")
    unknown = _UNKNOWN_COLUMN.fullmatch(text)
    if unknown is None:
        return text if text.endswith("?") else f"{text}."
    near = f" The nearest are {unknown[2]}." if unknown[2] else ""
    return f"Unknown column {unknown[1]}.{near}"


def _statements(con: duckdb.DuckDBPyConnection, sql: str) -> list[duckdb.Statement]:
    try:
        return con.extract_statements(sql)
    except duckdb.Error as error:
        raise InvalidInputError(f"{sentence(error)} Got {_shown(sql)}.") from error


def _condition(con: duckdb.DuckDBPyConnection, where: str, sql: str) -> Any:
    """Parse `sql` and give its where clause, if that is all that it adds to a plain select."""
    tree = _parsed(con, sql)
    if tree["error"]:
        why = " ".join(tree["error_message"].split())
        raise InvalidInputError(f"{_EXPECTED} Got {_shown(where)}: {why}.")
    nodes = [statement["node"] for statement in tree["statements"]]
    (plain,) = [statement["node"] for statement in _parsed(con, _PLAIN)["statements"]]
    condition = nodes[0].pop("where_clause", None) if len(nodes) == 1 else None
    plain.pop("where_clause")
    if condition is None or nodes[0] != plain:
        raise _no_condition(where)
    return condition


def _parsed(con: duckdb.DuckDBPyConnection, sql: str) -> Any:
    ((text,),) = con.execute("select json_serialize_sql($sql)", {"sql": sql}).fetchall()
    return _without_places(json.loads(text))


def _without_places(tree: Any) -> Any:
    """Leave out where in the text each part of a tree stands."""
    if isinstance(tree, dict):
        places = ("query_location", "query_location_length")
        return {name: _without_places(part) for name, part in tree.items() if name not in places}
    return [_without_places(part) for part in tree] if isinstance(tree, list) else tree


def _classes(tree: Any) -> set[str]:
    """Give the kinds of all expressions in a tree."""
    own: set[str] = set()
    if isinstance(tree, dict):
        own = {str(tree["class"])} if "class" in tree else set()
        tree = list(tree.values())
    if isinstance(tree, list):
        return own.union(*(_classes(part) for part in tree))
    return own


def _no_condition(where: str) -> InvalidInputError:
    return InvalidInputError(f"{_EXPECTED} Got {_shown(where)}.")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}...")

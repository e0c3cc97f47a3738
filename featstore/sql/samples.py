"""Folding the view `samples`: the rows that are stored, joined with their items."""

from __future__ import annotations

import duckdb

# A line of the view depends on the rows, ledgers and items of one image only. So it is enough to
# make the lines anew of images whose rows or items changed (`remade`), and to look again which
# lines are live of images whose ledgers or tombstones did (`touched`).
_CANDIDATES = """
create or replace temp table candidates as
select feature_set, "row", image_key, crop, "view"
from rows
where image_key in (select image_key from touched union all select image_key from remade)
"""
_LIVE = """
create or replace temp table live as
select feature_set, "row"
from {candidates} as candidate
where exists (
        from ledger
        where ledger.feature_set = candidate.feature_set
            and ledger."row" = candidate."row"
            and ledger.status = 'ok'
    )
    and not exists (
        from tombstones
        where tombstones.feature_set = candidate.feature_set
            and tombstones."row" = candidate."row"
    )
qualify row_number() over (
    partition by feature_set, image_key, crop, "view" order by "row"
) = 1
"""
_IS_REMADE = "rows.image_key in (select image_key from remade)"
_REMAKE = """
insert into sample_lines by name
with assigned as (
    select
        rows.feature_set,
        rows."row",
        rows.image_key,
        rows.crop,
        rows."view",
        live."row" is not null as is_live
    from rows
    left join live on live.feature_set = rows.feature_set and live."row" = rows."row"
    where {is_remade}
)
select
    assigned."row",
    items.item,
    items.dataset,
    unnest(items.splits) as split,
    items.path,
    items.label,
    assigned.image_key,
    items.height,
    items.width,
    assigned.crop,
    assigned."view",
    assigned.feature_set,
    items.group_id,
    items."timestamp",
    items.attributes,
    items.label_kinds,
    assigned.is_live
from assigned
inner join items on items.image_key = assigned.image_key and items.crop = assigned.crop
order by assigned.feature_set, assigned."row", items.item, split
"""
_MARK = """
update sample_lines
set is_live = not is_live
where exists (
        from candidates
        where candidates.feature_set = sample_lines.feature_set
            and candidates."row" = sample_lines."row"
    )
    and is_live <> exists (
        from live
        where live.feature_set = sample_lines.feature_set and live."row" = sample_lines."row"
    )
"""


def make(con: duckdb.DuckDBPyConnection) -> None:
    """Make the lines of `samples` where there are none yet."""
    con.execute(_LIVE.format(candidates="rows"))
    con.execute(_REMAKE.format(is_remade="true"))


def bring_up_to_date(con: duckdb.DuckDBPyConnection) -> None:
    """Make the lines of `samples` fit the other tables for the images in `remade` and `touched`."""
    con.execute("delete from touched where image_key in (select image_key from remade)")
    con.execute(_CANDIDATES)
    con.execute(_LIVE.format(candidates="candidates"))
    if _holds_any(con, "remade"):
        con.execute("delete from sample_lines where image_key in (select image_key from remade)")
        con.execute(_REMAKE.format(is_remade=_IS_REMADE))
    if _holds_any(con, "touched"):
        con.execute(_MARK)


def _holds_any(con: duckdb.DuckDBPyConnection, table: str) -> bool:
    return bool(con.execute(f"from {table} limit 1").fetchall())

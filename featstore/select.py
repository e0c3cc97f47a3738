"""Which rows a stream goes through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featstore import index
from featstore.errors import NotFoundError, invalid
from featstore.ledgers import check_stored, ledgers_of, listed
from featstore.store import FeatureSetFolder

_FEW_LEDGERS = 64
_SPARSE = 64  # rows up to so many times their count are marked, others searched for
_LEDGER = """
select "row", status = 'ok' as is_ok
from ledger
where feature_set = $key and tap = $tap
    and "row" not in (select "row" from tombstones where feature_set = $key)
"""


def select_rows(
    folder: FeatureSetFolder, names: Sequence[str], where: str | None = None
) -> np.ndarray:
    """List the rows that fulfil `where` and are stored for every tap of `names`, ascending.

    A row that a tap rejected (its numbers did not fit the dtype) is left out; the ledger says so.

    Args:
        folder: Feature set.
        names: "TAP" or "TAP/prefix".
        where: One SQL expression over the view `samples`; None selects all.

    Raises:
        NotFoundError: No row fulfils it, or a tap is not yet extracted for some that do.
        InvalidInputError: `where` is not one plain expression.
    """
    rows = index.sample_rows(_store_path(folder), where, folder.key)
    for tap in _taps(names):
        known, is_ok = _ledger(folder, tap)
        is_stored = _is_in(rows, known[is_ok])
        if is_stored.all():  # of many rows, looking each one up takes longest
            continue
        lacking = rows[~_is_in(rows, known)]
        if len(lacking):
            raise NotFoundError(
                f"Tap {tap} of feature set {folder.key} is not extracted for {len(lacking)} of "
                f"the selected rows (the first is {lacking[0]}). Run `featstore extract` again to "
                "complete them, or narrow `where`."
            )
        rows = rows[is_stored]
    if not len(rows):
        chosen = "No stored row" if where is None else f"No stored row with {where}"
        raise NotFoundError(f"{chosen} in feature set {folder.key}. See `featstore ls`.")
    return rows


def check_rows(folder: FeatureSetFolder, names: Sequence[str], rows: np.ndarray) -> None:
    """Refuse rows that are not stored for every tap of `names`.

    A few ledgers are read, for they are needed anyway; of many the index knows more quickly.

    Raises:
        NotFoundError: The message names them.
    """
    rows = ledgers_of(folder).tombstones().current(rows)
    shards = np.unique(rows // folder.layout.shard_rows).tolist()
    for tap in _taps(names):
        is_parsed = ledgers_of(folder).is_parsed
        if sum(not is_parsed(tap, shard) for shard in shards) <= _FEW_LEDGERS:
            check_stored(folder, tap, rows)
            continue
        known, is_ok = _ledger(folder, tap)
        lacking = np.unique(rows[~_is_in(rows, known[is_ok])])
        if len(lacking):
            raise NotFoundError(
                f"{len(lacking)} of the rows are not stored for tap {tap} in feature set "
                f"{folder.key} (rejected, removed or never committed): {listed(lacking.tolist())}. "
                "Choose rows with `where`, or extract them."
            )


def as_rows(rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Parse row numbers into int64.

    Raises:
        InvalidInputError: They are not a flat list of whole numbers of 0 or more.
    """
    array = np.asarray(rows)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise invalid("rows", rows, "a flat list of row numbers")
    if array.size and (array.min() < 0 or array.max() >= 2**63):
        raise invalid("rows", int(array.min()), "row numbers, 0 or more")
    return np.ascontiguousarray(array, dtype=np.int64)


def _is_in(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Tell which rows are known; they lie dense, so a mark for each is enough."""
    n_marks = int(rows.max()) + 1 if len(rows) else 0
    if n_marks > _SPARSE * len(rows):
        return np.isin(rows, known)
    marks = np.zeros(n_marks, bool)
    marks[known[known.view(np.uint64) < n_marks]] = True
    return marks[rows]


def _store_path(folder: FeatureSetFolder) -> Path:
    return folder.path.parent.parent


def _taps(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in names))


def _ledger(folder: FeatureSetFolder, tap: str) -> tuple[np.ndarray, np.ndarray]:
    """Give the rows of a tap's ledgers, in any order, and whether each is stored."""
    lines = index.query(_store_path(folder), _LEDGER, {"key": folder.key, "tap": tap})
    return lines["row"].to_numpy(), lines["is_ok"].to_numpy()

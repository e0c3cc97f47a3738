"""Check committed shards: every row against its assignment, every chunk against its checksums."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featstore.errors import FeatstoreError, FormatError, NotFoundError
from featstore.findings import Findings
from featstore.ledger import read_ledger
from featstore.remote.location import find_mirror
from featstore.remote.writing import at_hand
from featstore.shards import ShardFile, ShardLayout, crc32c
from featstore.store import FeatureSetFolder

KEYS = ("row", "image_key", "crop", "view")
"""What a ledger repeats of an assignment."""


def check_shard(
    findings: Findings,
    folder: FeatureSetFolder,
    tap: str,
    shard: int,
    *,
    expected: pa.Table | None,
    layouts: Mapping[str, ShardLayout | None],
    removed: Collection[int] = (),
) -> set[int]:
    """Check one committed shard of one tap.

    Args:
        findings: Where problems go.
        folder: Feature set.
        tap: Tap.
        shard: Shard.
        expected: `KEYS` of the rows that are assigned to the shard; None if nobody knows.
        layouts: Arrays of the tap whose metadata is good; None where only zarr reads them.
        removed: Rows that nobody reads any more; their bytes may be gone.

    Returns:
        The rows that are stored and whole.
    """
    path = folder.ledger_path(tap, shard)
    try:
        ledger = read_ledger(folder, tap, shard)
    except NotFoundError:  # a repair of another process has taken it away
        return set()
    except FeatstoreError as error:
        findings.add("ledger", path, str(error), tap=tap, shard=shard)
        return set()
    if expected is not None and not expected.num_rows and ledger.num_rows:
        text = f"{path} commits rows that no assignment names. Restore the assignments from a copy."
        findings.add("assignment", path, text, tap=tap, shard=shard)
        return set()
    if expected is not None and not ledger.select(KEYS).equals(expected):
        text = f"{path} lists other rows than were assigned to shard {shard}."
        findings.add("ledger", path, text, tap=tap, shard=shard)
        return set()
    good = ledger.filter(pc.equal(ledger["status"], "ok"))
    if removed:
        is_kept = [row not in removed for row in good["row"].to_pylist()]
        good = good.filter(pa.array(is_kept, pa.bool_()))
    rows = good["row"].to_pylist()
    damaged: set[int] = set()
    for array, layout in layouts.items():
        check = _ArrayCheck(folder, tap, array, shard)
        crcs = dict(zip(rows, good[f"{array}_crc32c"].to_pylist(), strict=True))
        wrong, message, n_bytes = _look(check, crcs, layout)
        if wrong:
            findings.add("shard", check.path, message, tap=tap, shard=shard, rows=wrong)
            damaged.update(wrong)
        elif rows:
            findings.report.bytes += n_bytes
    return set(rows) - damaged


_LOOKS = 3


def _look(
    check: _ArrayCheck, crcs: Mapping[int, int | None], layout: ShardLayout | None
) -> tuple[Sequence[int], str, int]:
    """Give damaged rows, what is wrong with the first, and the bytes of the file.

    What comes from a URL is fetched again before it counts as damaged.
    """
    for _ in range(1 if find_mirror(check.path) is None else _LOOKS):
        with at_hand(check.path):
            wrong, message = check.damaged_rows(crcs, layout)
            n_bytes = check.path.stat().st_size if crcs and not wrong else 0
        if not wrong:
            break
    return wrong, message, n_bytes


class _ArrayCheck:
    """Compares one shard file with its ledger's checksums."""

    def __init__(self, folder: FeatureSetFolder, tap: str, array: str, shard: int) -> None:
        self.folder = folder
        self.tap = tap
        self.array = array
        self.start = shard * folder.layout.shard_rows
        self.path = folder.shard_file(tap, array, shard)

    def damaged_rows(
        self, crcs: Mapping[int, int | None], layout: ShardLayout | None
    ) -> tuple[Sequence[int], str]:
        """List the rows whose chunk is damaged, and say what is wrong with the first."""
        if not crcs:
            return (), ""
        if layout is None:
            return self._decoded(crcs)
        try:
            shard = ShardFile(self.path, layout)
        except FormatError as error:
            return tuple(crcs), str(error)
        buffer = np.empty(layout.chunk_bytes, np.uint8)
        found: dict[int, int | str] = {}  # chunk -> its checksum, or what is wrong with it
        damaged: dict[int, str] = {}
        for row, crc in crcs.items():
            chunk = 0 if self.array == "pooled" else row - self.start
            if chunk not in found:
                try:
                    found[chunk] = shard.copy_chunk(chunk, buffer)
                except FormatError as error:
                    found[chunk] = str(error)
            if found[chunk] != crc:
                damaged[row] = self._message(found[chunk])
        return tuple(damaged), next(iter(damaged.values()), "")

    def _message(self, found: int | str) -> str:
        return (
            found
            if isinstance(found, str)
            else f"{self.path} holds other data than its ledger says."
        )

    def _decoded(self, crcs: Mapping[int, int | None]) -> tuple[Sequence[int], str]:
        """Check a shard that only zarr can read, by the checksum of its decoded numbers."""
        from featstore.arrays import open_array

        stop = self.start + self.folder.layout.shard_rows
        try:
            block = open_array(self.folder, self.tap, self.array)[self.start : stop]
        except (OSError, ValueError, RuntimeError) as error:
            return tuple(crcs), f"{self.path} cannot be read: {error}"
        damaged = [row for row, crc in crcs.items() if self._crc(block, row) != crc]
        return tuple(damaged), self._message(0)

    def _crc(self, block: np.ndarray, row: int) -> int:
        values = block if self.array == "pooled" else block[row - self.start]
        return crc32c(np.ascontiguousarray(values).reshape(-1).view(np.uint8))

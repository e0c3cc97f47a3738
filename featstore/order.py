"""The order of an epoch: the same on any machine, with any version of NumPy.

Each place of the selection draws one 64-bit number from the raw stream of PCG64 seeded by
(seed, epoch), which NumPy promises never to change; sorting by these numbers, ties by place, gives
the permutation. No method of `numpy.random.Generator` is used: those may change.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

import numpy as np

from featstore.errors import InvalidInputError, invalid

WINDOW_SHARDS = 8
"""Shards that `shuffle="window"` mixes with each other."""

Shuffle = bool | str
"""False, True or "window"."""


def draw_keys(n: int, *entropy: int) -> np.ndarray:
    """Draw n uint64 numbers that depend on `entropy` only."""
    return (
        np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n).astype(np.uint64, copy=False)
    )


def permutation(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Give a random order of 0 ... n - 1: int64, decided by `seed` and `epoch`."""
    return argsort_keys(draw_keys(n, seed, epoch))


def argsort_keys(keys: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Sort places by group, then uint64 key, then place; `np.lexsort` gives the same, far slower.

    What fits of group, key and place is packed into one word a place, and the words are sorted in
    place. Only where two keys begin with the same bits are the whole keys looked at.

    Args:
        keys: (n,) uint64.
        groups: (n,) whole numbers, 0 or more; None puts all places into one group.
    """
    n = len(keys)
    n_place_bits = max(n - 1, 1).bit_length()
    n_group_bits = 0 if groups is None or n == 0 else int(groups.max()).bit_length()
    if n_place_bits + n_group_bits > 63:
        return np.lexsort((keys, np.zeros(n, np.int64) if groups is None else groups))
    words = keys >> np.uint64(n_group_bits + n_place_bits)
    words <<= np.uint64(n_place_bits)
    if groups is not None:
        words |= groups.astype(np.uint64) << np.uint64(64 - n_group_bits)
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    order = (words & np.uint64((1 << n_place_bits) - 1)).astype(np.int64)
    words >>= np.uint64(n_place_bits)
    is_tied = np.zeros(n + 1, bool)
    np.equal(words[1:], words[:-1], out=is_tied[1:n])
    tied = np.flatnonzero(is_tied[1:] | is_tied[:-1])
    places = order[tied]
    order[tied] = places[np.lexsort((places, keys[places], words[tied]))]
    return order


def window_order(rows: np.ndarray, *, shard_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Give an order of the places of `rows` that stays inside a few shards at a time.

    The shards are shuffled, and the rows of each `WINDOW_SHARDS` consecutive ones mixed.
    """
    shards, member = _members(rows // shard_rows)
    rank = np.empty(len(shards), np.int64)
    rank[np.argsort(draw_keys(len(shards), seed, epoch, 1), kind="stable")] = np.arange(len(shards))
    windows = rank[member] // WINDOW_SHARDS
    return argsort_keys(draw_keys(len(rows), seed, epoch), windows)


def _members(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the different values, ascending, and which of them each is; faster where ascending."""
    starts = np.flatnonzero(values[1:] != values[:-1]) + 1
    if np.any(values[1:] < values[:-1]):
        unique, member = np.unique(values, return_inverse=True)
        return unique, member
    first = np.concatenate([np.zeros(min(1, len(values)), np.int64), starts])
    return values[first], np.repeat(np.arange(len(first)), np.diff(first, append=len(values)))


def order_rows(
    rows: np.ndarray, *, shuffle: Shuffle, shard_rows: int, seed: int, epoch: int
) -> np.ndarray:
    """Put the selected rows in the order of one epoch.

    Raises:
        InvalidInputError: `shuffle` is none of False, True and "window".
    """
    if shuffle == "window":
        return rows[window_order(rows, shard_rows=shard_rows, seed=seed, epoch=epoch)]
    if shuffle is True:
        return rows[permutation(len(rows), seed=seed, epoch=epoch)]
    if shuffle is False:
        return rows
    raise invalid("shuffle", shuffle, 'False, True or "window"')


def part_of(ordered: np.ndarray, *, rank: int, world_size: int, shuffle: Shuffle) -> np.ndarray:
    """Give one rank's part; the parts are disjoint, complete and differ by a row at most.

    A part is every `world_size`-th row, except of a window shuffle, where it is one piece, so
    that each rank touches few shards at a time.
    """
    if not 0 <= rank < world_size:
        raise invalid("rank", rank, f"0 or more and below the world size, {world_size}")
    if shuffle == "window":
        cut = [len(ordered) * part // world_size for part in (rank, rank + 1)]
        return ordered[cut[0] : cut[1]]
    return ordered[rank::world_size]


def mixing(ordered: np.ndarray, *, shard_rows: int, batch_size: int) -> float:
    """Measure how well an order mixes the shards: 1 is as good as a true permutation.

    The mean number of different shards in a batch, divided by what a true permutation of the same
    rows gives on average. Rows in storage order give about the inverse of the shards a batch could
    have.
    """
    shards, member, counts = np.unique(
        ordered // shard_rows, return_inverse=True, return_counts=True
    )
    n, size = len(ordered), min(batch_size, len(ordered))
    if n == 0:
        return 1.0
    n_batches = n // size
    pairs = np.arange(n_batches * size) // size * len(shards) + member[: n_batches * size]
    found = len(np.unique(pairs)) / n_batches
    # A batch misses a shard of `count` rows with probability C(n - count, size) / C(n, size).
    missed = np.zeros(len(shards))
    possible = n - counts >= size
    steps = np.arange(size)
    for count in np.unique(counts[possible]):
        missed[counts == count] = np.exp(np.log1p(-count / (n - steps)).sum())
    return float(found / (len(shards) - missed.sum()))


def digest_rows(key: str, rows: np.ndarray) -> str:
    """Name a selection of rows of one feature set: 16 hex digits."""
    digest = hashlib.sha256(key.encode())
    digest.update(np.ascontiguousarray(rows, dtype="<i8").data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where a stream stands: enough to go on with exactly the next batch."""

    seed: int
    epoch: int
    position: int  # rows of this rank's part that were given
    batch_size: int
    digest: str  # of the selected rows and their feature set
    shuffle: Shuffle
    rank: int
    world_size: int

    def to_json(self) -> str:
        """Write it as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """Read what `to_json` wrote.

        Raises:
            InvalidInputError: The text is something else.
        """
        try:
            values = json.loads(text)
            wrong = set(values) ^ {field.name for field in fields(cls)}
            if wrong:
                raise invalid("cursor", text, f"a stream's cursor ({', '.join(sorted(wrong))})")
            if not isinstance(values["position"], int):
                raise invalid("cursor.position", values["position"], "a whole number")
            return cls(**values)
        except (ValueError, TypeError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise invalid("cursor", text, "a stream's cursor as JSON") from error

    def check_fit(self, other: Cursor, n_rows: int) -> None:
        """Refuse a cursor of another stream than `other`, which may stand elsewhere.

        Raises:
            InvalidInputError: They differ in more than the position, or it is past the end.
        """
        names = [field.name for field in fields(self) if field.name != "position"]
        wrong = [name for name in names if getattr(self, name) != getattr(other, name)]
        if wrong:
            told = ", ".join(
                f"{name} {getattr(self, name)!r}, here {getattr(other, name)!r}" for name in wrong
            )
            raise InvalidInputError(
                f"The cursor does not fit this stream: it was taken with {told}. "
                "Repeat the call that gave it, or start the epoch anew."
            )
        if not 0 <= self.position <= n_rows:
            raise invalid("cursor.position", self.position, f"0 to {n_rows}, the rows of the part")

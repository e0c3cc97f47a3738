"""Finished cells of a protocol: one way to adapt to one identity, under all its seeds.

``cells/<key>.parquet`` holds a line for each seed and test instance, and in every line what was
done; a cell that failed is one line that says why. What has no file is not done yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featstore.errors import FormatError
from featstore.files import write_parquet
from featstore.hashing import short_key
from heads.protocol.design import parse_shots
from heads.protocol.plan import Way
from heads.protocol.statistics import Errors

FOLDER = "cells"
READINGS = ("pck@0.05", "pck@0.05u", "pck@0.05box")
"""PCK by what a distance is measured against, see `heads.metrics.keypoints`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Jittered:
    """How far one test instance's keypoints are off in crops around worse boxes, all together."""

    squares: float
    points: int
    hits: int  # of the first of `READINGS`
    counted: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How far one test instance's keypoints are off."""

    squares: float  # squared distances in shares of the frame, summed over its marked keypoints
    points: int  # marked keypoints
    hits: Mapping[str, int]  # keypoints that are near enough, for each of `READINGS`
    counted: Mapping[str, int]  # keypoints of which that can be told
    oks: float  # object keypoint similarity; -1: not known
    score: float  # mean confidence, 1 where the head tells none
    places: tuple[float, ...] = ()  # x and y of keypoints in source pixels, of the first seed
    jittered: Jittered | None = None  # None: not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What is adapted side by side: one way, one identity, all seeds."""

    fold: int
    way: Way
    identity: str
    is_tuning: bool
    lr: float | None  # None: nothing is trained
    n_seeds: int
    steps: int

    def key(self, *, run_id: str, design: str, jitters: Sequence[str] = ()) -> str:
        """Name its files: by all that decides its numbers, the trained head among them.

        Args:
            run_id: Of the trained head.
            design: Key of the identity's design.
            jitters: Views that are measured beside the plain one.
        """
        also = [list(jitters)] if jitters else []  # without any, cells of before there were hold
        return short_key([asdict(self), run_id, design, *also])


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A finished unit."""

    unit: Unit
    parameters: int  # that were trained for the identity
    seconds: float
    error: str | None  # why it failed; then there are no outcomes
    outcomes: tuple[tuple[Outcome, ...], ...]  # seeds, test instances in one order
    groups: tuple[str, ...]  # of the test instances

    def errors(self) -> Errors:
        """Give squared distances, whose mean has the RMSE as its root."""
        return Errors(
            sums_si=np.array([[one.squares for one in seed] for seed in self.outcomes]),
            counts_i=np.array([one.points for one in self.outcomes[0]], dtype=np.float64),
        )

    def hits(self, reading: str) -> Errors:
        """Give hits, whose mean is PCK; instances of which it cannot be told stay out."""
        known = [n for n, one in enumerate(self.outcomes[0]) if one.counted[reading] > 0]
        return Errors(
            sums_si=np.array([[seed[n].hits[reading] for n in known] for seed in self.outcomes]),
            counts_i=np.array([self.outcomes[0][n].counted[reading] for n in known], float),
        )

    def jittered(self) -> tuple[Errors, Errors] | None:
        """Give squared distances and hits in crops around worse boxes; None: not measured."""
        seeds = [[one.jittered for one in seed if one.jittered] for seed in self.outcomes]
        if not seeds[0]:
            return None
        known = [n for n, one in enumerate(seeds[0]) if one.counted > 0]
        squares = Errors(
            sums_si=np.array([[one.squares for one in seed] for seed in seeds]),
            counts_i=np.array([one.points for one in seeds[0]], dtype=np.float64),
        )
        hits = Errors(
            sums_si=np.array([[seed[n].hits for n in known] for seed in seeds]),
            counts_i=np.array([seeds[0][n].counted for n in known], dtype=np.float64),
        )
        return squares, hits


class CellFolder:
    """The cells of one protocol, on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path / FOLDER

    def has(self, key: str) -> bool:
        """Tell whether a cell is finished."""
        return self._file(key).exists()

    def write(self, key: str, cell: Cell) -> None:
        """Write a finished cell."""
        about = _about(cell)
        lines = [
            {**about, "seed": seed, "instance": number, "group": group, **_columns(one)}
            for seed, outcomes in enumerate(cell.outcomes)
            for number, (one, group) in enumerate(zip(outcomes, cell.groups, strict=True))
        ]
        table = pa.Table.from_pylist(lines or [about], schema=_SCHEMA)
        write_parquet(self._file(key), table)

    def read(self, key: str) -> Cell:
        """Read a finished cell.

        Raises:
            FormatError: Its file is missing or damaged.
        """
        path = self._file(key)
        try:
            lines = pq.read_table(path).to_pylist()
            about = lines[0]
            outcomes: dict[int, list[Outcome]] = {}
            for line in lines if about["error"] is None else ():
                outcomes.setdefault(line["seed"], []).append(_outcome(line))
            return Cell(
                unit=_unit(about),
                parameters=about["parameters"],
                seconds=about["seconds"],
                error=about["error"],
                outcomes=tuple(tuple(each) for each in outcomes.values()),
                groups=tuple(line["group"] for line in lines if line["seed"] == 0),
            )
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            raise FormatError(
                f"{path} is damaged ({type(error).__name__}). Delete it, and resume the protocol."
            ) from error

    def _file(self, key: str) -> Path:
        return self._path / f"{key}.parquet"


_OF_UNIT = ("fold", "identity", "is_tuning", "lr", "n_seeds", "steps")
_OF_WAY = ("variant", "mode", "init")
_OF_CELL = ("parameters", "seconds", "error")
_OF_OUTCOME = ("squares", "points", "oks", "score", "places")
_OF_JITTERED = ("squares", "points", "hits", "counted")
_SCHEMA = pa.schema(
    [
        ("fold", pa.int64()),
        ("identity", pa.string()),
        ("is_tuning", pa.bool_()),
        ("lr", pa.float64()),
        ("n_seeds", pa.int64()),
        ("steps", pa.int64()),
        ("variant", pa.string()),
        ("mode", pa.string()),
        ("init", pa.string()),
        ("shots", pa.string()),  # a number, or "all"
        ("parameters", pa.int64()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
        ("seed", pa.int64()),
        ("instance", pa.int64()),
        ("group", pa.string()),
        ("squares", pa.float64()),
        ("points", pa.int64()),
        ("oks", pa.float64()),
        ("score", pa.float64()),
        ("places", pa.list_(pa.float32())),
        *(
            (f"{kind}/{reading}", pa.int64())
            for reading in READINGS
            for kind in ("hits", "counted")
        ),
        *(
            (f"jittered/{name}", pa.float64() if name == "squares" else pa.int64())
            for name in _OF_JITTERED
        ),
    ]
)


def _about(cell: Cell) -> dict[str, Any]:
    """Give what stands in every line, for those who query the files."""
    return {
        **{name: getattr(cell.unit, name) for name in _OF_UNIT},
        **{name: getattr(cell.unit.way, name) for name in _OF_WAY},
        "shots": str(cell.unit.way.shots),
        **{name: getattr(cell, name) for name in _OF_CELL},
    }


def _unit(about: Mapping[str, Any]) -> Unit:
    (shots,) = parse_shots([about["shots"]])
    way = Way(**{name: about[name] for name in _OF_WAY}, shots=shots)
    return Unit(**{name: about[name] for name in _OF_UNIT}, way=way)


def _columns(one: Outcome) -> dict[str, Any]:
    found = {name: getattr(one, name) for name in _OF_OUTCOME}
    for reading in READINGS:
        found[f"hits/{reading}"] = one.hits[reading]
        found[f"counted/{reading}"] = one.counted[reading]
    for name in _OF_JITTERED if one.jittered else ():
        found[f"jittered/{name}"] = getattr(one.jittered, name)
    return found


def _outcome(line: Mapping[str, Any]) -> Outcome:
    # Cells of before worse boxes were measured have no such columns.
    jittered: dict[str, Any] = {name: line.get(f"jittered/{name}") for name in _OF_JITTERED}
    return Outcome(
        jittered=None if None in jittered.values() else Jittered(**jittered),
        **{**{name: line[name] for name in _OF_OUTCOME}, "places": tuple(line["places"])},
        hits={reading: line[f"hits/{reading}"] for reading in READINGS},
        counted={reading: line[f"counted/{reading}"] for reading in READINGS},
    )

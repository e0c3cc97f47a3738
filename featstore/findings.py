"""What a verification finds: problems, waste, and how much was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featstore.store import FeatureSetFolder, StoreFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong.

    A repair puts these kinds right: "shard" and "ledger" (extracted again), "array" and "group"
    (metadata written anew), "foreign" (deleted). The others are "items", "labels", "assignment",
    "tombstones", "norm", "tail" and "feature set".
    """

    kind: str
    file: str  # relative to the store
    message: str
    feature_set: str = ""
    tap: str = ""
    shard: int | None = None
    rows: tuple[int, ...] = ()
    repaired: bool = False


@dataclass(kw_only=True, slots=True)
class VerifyReport:
    """What was checked and what was found."""

    store: str
    rows: int = 0  # stored rows, over all feature sets
    shards: int = 0  # shards times taps
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    waste: list[str] = field(default_factory=list)  # left by interrupted writes; `gc` sweeps them

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, or all of it was repaired."""
        return all(problem.repaired for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """A report on its way, and the feature set (if it is one) that is being looked at."""

    store: StoreFolder
    report: VerifyReport
    folder: FeatureSetFolder | None = None

    def add(
        self,
        kind: str,
        path: Path,
        message: str,
        *,
        tap: str = "",
        shard: int | None = None,
        rows: Sequence[int] = (),
    ) -> None:
        """Report a problem of one file."""
        self.report.problems.append(
            Problem(
                kind=kind,
                file=_relative(self.store, path),
                message=message,
                feature_set=self.folder.key if self.folder else "",
                tap=tap,
                shard=shard,
                rows=tuple(rows),
            )
        )

    def add_waste(self, path: Path) -> None:
        """Report what an interrupted write left."""
        self.report.waste.append(_relative(self.store, path))


def _relative(store: StoreFolder, path: Path) -> str:
    return path.relative_to(store.path).as_posix()

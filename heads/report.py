"""What a finished training says of itself: its record, its metrics, and the caller's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from featstore.files import write_parquet
from heads import runs as folders
from heads.evaluate import Evaluation
from heads.loop import Loop
from heads.setup import Setup

METRICS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("name", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What a training did."""

    run_id: str
    path: str
    head: str
    task: str
    feature_sets: tuple[str, ...]
    taps: tuple[str, ...]
    parameters: int
    dead_parameters: int
    steps: int  # done; fewer than asked for where it stopped early
    best_step: int
    best_loss: float | None  # on the held-out part; None where nothing was held out
    seconds: float
    split: str  # what `metrics` were measured on: "test", else "val"
    images: int
    metrics: dict[str, float]
    intervals: dict[str, list[float] | None]
    note: str  # how the intervals were made
    pictures: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)  # path to reason
    learned: dict[str, Any] = field(default_factory=dict)  # what the head tells of itself

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def write_metrics(path: Path, split: str, result: Evaluation) -> None:
    """Write metrics and the sums of each image into a run folder."""
    lines = [
        {"split": split, "name": m.name, "value": m.value, "low": m.low, "high": m.high}
        for m in result.metrics
    ]
    write_parquet(path / folders.METRICS, pa.Table.from_pylist(lines, schema=METRICS_SCHEMA))
    split_column = pa.array([split] * result.per_image.num_rows)
    write_parquet(path / folders.PER_IMAGE, result.per_image.add_column(0, "split", split_column))


def finished_record(
    record: Mapping[str, Any],
    setup: Setup,
    loop: Loop,
    seconds: float,
    *,
    result: Evaluation | None,
    split: str,
) -> dict[str, Any]:
    """Complete the record of a run."""
    done = {
        **record,
        "status": folders.DONE,
        "steps": loop.step,
        "best_step": loop.best_step,
        "best_loss": loop.best_value,
        "is_stopped_early": loop.is_stopped,
        "seconds": round(seconds, 3),
        "measured": None,
        "left_out": dict(setup.left_out),
        "learned": setup.model.head.learned(),
    }
    if result is not None:
        done["left_out"] = {**setup.left_out, **result.left_out}
        done["protocol"] = setup.model.task.protocol(result.sources)
        done["measured"] = {
            "split": split,
            "images": result.per_image.num_rows,
            "groups": result.n_groups,
            "primary_metric": setup.model.task.primary_metric,
            "metrics": result.values(),
            "intervals": result.intervals(),
            "note": result.metrics[0].note,
        }
    return done


def make_report(
    path: Path, record: Mapping[str, Any], result: Evaluation | None, pictures: Sequence[str]
) -> RunReport:
    """Make the caller's report from the record of a finished run."""
    measured = record["measured"] or {}
    return RunReport(
        run_id=path.name,
        path=str(path),
        head=record["head"],
        task=record["task"],
        feature_sets=tuple(record["feature_sets"]),
        taps=tuple(record["taps"]),
        parameters=record["parameters"],
        dead_parameters=record["dead_parameters"],
        steps=record["steps"],
        best_step=record["best_step"],
        best_loss=record["best_loss"],
        seconds=record["seconds"],
        split=measured.get("split", ""),
        images=measured.get("images", 0),
        metrics={} if result is None else result.values(),
        intervals={} if result is None else result.intervals(),
        note=measured.get("note", ""),
        pictures=tuple(str(path / name) for name in pictures),
        left_out=dict(record["left_out"]),
        learned=record["learned"],
    )

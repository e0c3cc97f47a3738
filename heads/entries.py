"""Read the runs of a store for the board: their records, and which images each one used."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from featstore.hashing import short_key
from heads.runs import DONE, PAIRS, PER_IMAGE, Run
from heads.selection import TRAIN, VAL
from heads.table import Entry


def read_entries(runs: Sequence[Run]) -> tuple[list[Entry], dict[str, str]]:
    """Read finished runs, in their order; those that cannot be ranked come with the reason.

    Args:
        runs: Of one store, oldest first.

    Returns:
        The runs that were measured, and the others: run id to the reason why.
    """
    entries: list[Entry] = []
    left_out: dict[str, str] = {}
    for run in runs:
        if run.status != DONE:
            left_out[run.run_id] = f"It is {run.status}."
        elif run.record.get("measured") is None:
            left_out[run.run_id] = "It was not measured: nothing was held out or kept for a test."
        else:
            try:
                entries.append(_read_entry(run))
            except (OSError, pa.ArrowException, KeyError) as error:
                text = " ".join(str(error).split())
                left_out[run.run_id] = f"Its {PAIRS} or {PER_IMAGE} cannot be read: {text}."
    return entries, left_out


def _read_entry(run: Run) -> Entry:
    columns = ["row", "item", "dataset", "image_key", "part"]
    pairs = pq.read_table(run.path / PAIRS, columns=columns).to_pylist()
    measured = pq.read_table(run.path / PER_IMAGE, columns=["row", "item", "dataset"]).to_pylist()
    images = {(pair["row"], pair["item"]): pair["image_key"] for pair in pairs}
    parts = (TRAIN, VAL)
    # Mirrored views of an image count once.
    trained = {(pair["item"], pair["image_key"]) for pair in pairs if pair["part"] in parts}
    used = {(line["item"], images[line["row"], line["item"]]) for line in measured}
    return Entry(
        run_id=run.run_id,
        record=run.record,
        datasets=tuple(sorted({line["dataset"] for line in measured})),
        measured_images=short_key(sorted(used)),
        trained_images=f"{len(trained)} images [{short_key(sorted(trained))[:8]}]",
    )

"""One run on its way: its folder, its checkpoint, how it ends."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from featstore.errors import FormatError, InvalidInputError
from featstore.files import write_bytes, write_parquet
from featstore.types import ProgressCallback
from heads import runs as folders
from heads.evaluate import measure_pairs
from heads.feed import Feed
from heads.gallery import draw_pictures
from heads.loop import Loop
from heads.model import save_model
from heads.report import RunReport, finished_record, make_report, write_metrics
from heads.selection import TEST, VAL, evenly
from heads.setup import Setup
from heads.supply import Supply


class Training:
    """One run; make it where torch's random numbers are those that shall decide it."""

    def __init__(self, setup: Setup, path: Path, record: dict[str, Any]) -> None:
        self.setup = setup
        self.path = path
        self.record = record
        self.error: InvalidInputError | None = None
        self._loop = Loop(setup.model, setup.recipe)
        self._supply: Supply | None = None
        self._before_s = 0.0
        self._began = 0.0
        self._seconds = 0.0

    @property
    def loop(self) -> Loop:
        """What it has learned so far."""
        return self._loop

    @property
    def supply(self) -> Supply:
        """What makes its batches, once it was begun."""
        assert self._supply is not None
        return self._supply

    def begin(self, feed: Feed, held: ExitStack) -> None:
        """Hold the run's folder, make it where it is new, go on from its checkpoint.

        Args:
            feed: Where its rows come from.
            held: Lets go of the folder.

        Raises:
            ConflictError: Another process trains in it.
            FormatError: The checkpoint is damaged.
        """
        is_new = not self.path.exists()
        if is_new:
            self.path.mkdir(parents=True)
        held.enter_context(folders.held(self.path))
        if is_new:
            write_parquet(self.path / folders.PAIRS, self.setup.selection.to_table())
        self.record.pop("error", None)
        self._write_status(folders.RUNNING)
        self._supply = Supply(self.setup, feed)
        self._before_s = self._restore()
        self._began = time.perf_counter()

    def save(self) -> None:
        """Write the state down: the checkpoint, and the best weights so far."""
        self._seconds = self._before_s + time.perf_counter() - self._began
        sink = io.BytesIO()
        torch.save({**self._loop.state(), "seconds": self._seconds}, sink)
        write_bytes(self.path / folders.CHECKPOINT, sink.getbuffer())
        if self._loop.best_state is not None:
            save_model(self.path, self._loop.best_state, self.setup.model.norm)

    def finish(self, feed: Feed, progress: ProgressCallback) -> RunReport:
        """Measure the best weights, draw pictures, complete the record."""
        setup, loop = self.setup, self._loop
        assert loop.best_state is not None
        setup.model.head.load_state_dict(loop.best_state)
        write_parquet(self.path / folders.CURVES, loop.curves_table())
        selection = setup.selection
        # The test part, else the held-out part.
        split, pairs = (TEST, selection.test) if selection.test else (VAL, selection.val)
        result = None
        pictures: list[str] = []
        if pairs:
            result = measure_pairs(setup.model, feed, pairs, setup.labels, progress=progress)
            write_metrics(self.path, split, result)
            drawn = evenly(pairs, setup.recipe.loop.pictures)
            pictures = draw_pictures(self.path, setup.model, feed, drawn, setup.labels)
        self.record = finished_record(
            self.record, setup, loop, self._seconds, result=result, split=split
        )
        folders.write_record(self.path, self.record)
        return make_report(self.path, self.record, result, pictures)

    def fail(self, error: InvalidInputError) -> None:
        """Note that it cannot go on."""
        self.error = error
        self.end_badly(error)

    def end_badly(self, error: BaseException) -> None:
        """Say in the record that it was interrupted, or why it failed; a finished run stays so."""
        if self._supply is None or self.record["status"] != folders.RUNNING:
            return
        if isinstance(error, KeyboardInterrupt):
            self._write_status(folders.INTERRUPTED)
        else:
            self.record["error"] = str(error)
            self._write_status(folders.FAILED)

    def _write_status(self, status: str) -> None:
        self.record["status"] = status
        folders.write_record(self.path, self.record)

    def _restore(self) -> float:
        """Take over the checkpoint where there is one; give the seconds trained so far."""
        file = self.path / folders.CHECKPOINT
        if not file.exists():
            return 0.0
        try:
            with zipfile.ZipFile(file) as archive:
                wrong = archive.testzip()  # checks the checksum of each part
            if wrong is not None:
                raise ValueError(wrong)
            state = torch.load(file, map_location="cpu", weights_only=True)
            self._loop.restore(state)
            self._seconds = float(state["seconds"])
            return self._seconds
        except (
            RuntimeError,
            LookupError,
            ValueError,
            zipfile.BadZipFile,
            pickle.PickleError,
        ) as error:
            raise FormatError(
                f"{file} is damaged. Delete it to train this run from its first step."
            ) from error

"""One extraction on its way: items recorded, rows assigned, shards done, a report given."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featstore.assign import Framing, RowKey, row_key
from featstore.codecs import LIMITS
from featstore.errors import BadImageError, InvalidInputError
from featstore.feature_sets import NewFeatureSet, ensure_feature_set, plan_difference
from featstore.files import exclusive, remove_partials
from featstore.items import BadImage, FoundItem, find_items, write_items
from featstore.labels import store_labels
from featstore.latency import Latency
from featstore.plan import RunOptions
from featstore.planning import Work, bad_rows, plan_work
from featstore.remote.location import shown
from featstore.shard_job import Source, run_jobs
from featstore.store import FeatureSetFolder, StoreFolder, complete_folder, create_folder, is_store
from featstore.tail_file import find_tail
from featstore.types import (
    FeatureReader,
    Item,
    LeavesOut,
    Progress,
    ProgressCallback,
    Reader,
    TapShape,
)
from featstore.version import __version__


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractReport:
    """What an extraction did."""

    store: str
    feature_set: str
    name: str
    backbone: str
    taps: tuple[str, ...]
    tail: int  # blocks of the backbone that are stored with the feature set
    rows: int  # of the images asked for, stored now
    new_rows: int
    reused_rows: int
    bad: tuple[BadImage, ...]
    bytes: int  # of `rows`, as they lie on the disk
    seconds: float
    images_per_second: float  # of the new rows, the loading of the model left out
    latency: Latency | None = None  # of the backbone, where it was asked for

    def to_json(self) -> dict[str, Any]:
        """Give JSON values; `bad_images` counts, `bad` lists."""
        plain = asdict(self)
        return {**plain, "bad_images": len(self.bad)}


class Extraction:
    """One call of `extract`: where to, from what, how, and since when."""

    def __init__(
        self,
        path: Path,
        readers: Sequence[Reader],
        selected: Mapping[str, Sequence[Item]],
        *,
        options: RunOptions,
        progress: ProgressCallback,
        began: float,
    ) -> None:
        self.path = path
        self.readers = readers
        self.selected = selected
        self.options = options
        self.progress = progress
        self.began = began
        self.n_threads = options.n_threads or os.cpu_count() or 1
        self.bad: list[BadImage] = []

    @contextlib.contextmanager
    def locked_store(self, key: str) -> Iterator[StoreFolder]:
        """Open or make the store and hold the feature set's writer lock."""
        if is_store(self.path):
            store = complete_folder(self.path)
        else:
            store = create_folder(self.path, library=__version__)
        purpose = f"extracting into feature set {key}"
        with exclusive(store.locks_path / f"{key}.lock", purpose=purpose):
            remove_partials(store.path / "feature_sets" / key)
            yield store

    def run(
        self,
        store: StoreFolder,
        new: NewFeatureSet,
        shapes: Sequence[TapShape],
        *,
        framing: Framing,
        source: Source,
        batch_size: int,
    ) -> ExtractReport:
        """Record the items, make the feature set, do the shards that are missing."""
        found = self._record_items(store)
        self._announce(store, new)
        folder = ensure_feature_set(store, new, shapes)
        taps = [shape.tap for shape in shapes]
        work = plan_work(folder, framing, taps, found, options=self.options, source=source)
        began = time.perf_counter()
        stored = self._do_shards(work, source, batch_size, LIMITS[new.dtype])
        seconds = time.perf_counter() - began
        return self._report(folder, taps, work, stored, seconds)

    def _record_items(self, store: StoreFolder) -> dict[str, list[FoundItem]]:
        """Hash the images, then store items, labels and thumbnails."""
        found: dict[str, list[FoundItem]] = {}
        for reader in self.readers:
            for note in reader.notes() if isinstance(reader, LeavesOut) else ():
                self.progress(Progress(stage="items", message=f"{reader.name}: {note}"))
            items = self.selected[reader.name]
            found[reader.name], unread = find_items(
                reader, items, n_threads=self.n_threads, progress=self.progress
            )
            self._leave_out(unread)
        if not any(found.values()):
            raise InvalidInputError(
                f"None of the {len(self.bad)} images can be read. The first: "
                f"{self.bad[0].path}: {self.bad[0].reason}"
            )
        for reader in self.readers:
            lock = store.locks_path / f"items-{reader.name}.lock"
            with exclusive(lock, purpose="recording items", timeout_s=600):
                self._record(store, reader, found[reader.name])
        return found

    def _record(self, store: StoreFolder, reader: Reader, found: Sequence[FoundItem]) -> None:
        remove_partials(store.items_path(reader.name))
        write_items(store, reader, found)
        if self.options.targets:
            remove_partials(store.labels_path(reader.name))
            has_images = not isinstance(reader, FeatureReader)
            self._leave_out(
                store_labels(
                    store,
                    reader,
                    found,
                    thumbnails=has_images,
                    n_threads=self.n_threads,
                    progress=self.progress,
                )
            )

    def _leave_out(self, new: Sequence[BadImage]) -> None:
        if new and self.options.on_bad_image == "fail":
            raise BadImageError(
                f"{new[0].path}: {new[0].reason} Use --on-bad-image skip to go on without it."
            )
        self.bad.extend(new)

    def _announce(self, store: StoreFolder, new: NewFeatureSet) -> None:
        """Say field by field how a new feature set differs from those of the same backbone."""
        keys = store.feature_set_keys()
        if new.key in keys or new.plan is None:
            return
        for other in (store.feature_set(key) for key in keys):
            is_same = other.attributes["backbone"].get("name") == new.backbone.get("name")
            if is_same and other.plan is not None:
                text = (
                    f"New feature set {new.key}; it differs from {other.key} in "
                    f"{plan_difference(other.plan, new.plan)}."
                )
                self.progress(Progress(stage="extract", message=text))

    def _do_shards(self, work: Work, source: Source, batch_size: int, limit: float) -> set[RowKey]:
        """Do the jobs; give the keys that are stored now."""
        total = sum(len(job.lines) for job in work.jobs)
        stored: set[RowKey] = set()
        rejected: dict[RowKey, str] = {}
        done = 0

        def count(n_rows: int) -> None:
            nonlocal done
            done += n_rows
            self.progress(Progress(stage="extract", done=done, total=total))

        self._leave_out(bad_rows(work, {}))
        for result in run_jobs(
            work.jobs,
            source,
            batch_size=batch_size,
            n_threads=self.n_threads,
            limit=limit,
            on_batch=count,
        ):
            keys = {line["row"]: row_key(line) for line in result.job.lines}
            rejected = {keys[row]: why for row, why in result.rejected.items()}
            stored.update(key for row, key in keys.items() if row not in result.rejected)
            self._leave_out(bad_rows(work, rejected, only_new=True))
        return stored

    def _report(
        self,
        folder: FeatureSetFolder,
        taps: Sequence[str],
        work: Work,
        stored: set[RowKey],
        seconds: float,
    ) -> ExtractReport:
        new = len((stored & set(work.wanted)) - work.reused)
        rows = len(work.reused) + new
        tail = find_tail(folder)
        per_row = sum(folder.taps[tap].bytes_per_row(folder.store_dtype.itemsize) for tap in taps)
        return ExtractReport(
            store=shown(self.path),
            feature_set=folder.key,
            name=folder.attributes["name"],
            backbone=str(folder.attributes["backbone"].get("name", "")),
            taps=tuple(taps),
            tail=0 if tail is None else tail.n_blocks,
            rows=rows,
            new_rows=new,
            reused_rows=len(work.reused),
            bad=tuple(self.bad),
            bytes=rows * per_row,
            seconds=round(time.perf_counter() - self.began, 3),
            images_per_second=round(len(stored) / seconds, 2) if stored else 0.0,
        )

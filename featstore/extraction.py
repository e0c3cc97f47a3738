"""One extraction on its way: items recorded, rows assigned, shards done, a report given."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featstore.assign import Framing, row_key
from featstore.claims import sweep_partials
from featstore.codecs import LIMITS
from featstore.errors import BadImageError, InvalidInputError
from featstore.feature_sets import NewFeatureSet, ensure_feature_set, plan_difference
from featstore.files import exclusive, remove_partials
from featstore.items import BadImage, FoundItem, find_items, write_items
from featstore.labels import store_labels
from featstore.latency import Latency
from featstore.lines import RowKey
from featstore.local_devices import n_cores
from featstore.plan import RunOptions
from featstore.planning import Work, bad_rows, decodes, plan_work
from featstore.remote.location import shown
from featstore.shard_job import Pace, Source
from featstore.shared_shards import Crew, Outcome, SerialCrew, ShardTask
from featstore.store import FeatureSetFolder, StoreFolder, ensure_folder
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

_PATIENCE_S = 86_400.0
"""How long to wait for another process that records the same images, which may take hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """A shard that nobody does any more, and why."""

    shard: int
    images: tuple[str, ...]  # "dataset/path"
    reason: str


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
    reused_rows: int  # were there, or came from another process meanwhile
    bad: tuple[BadImage, ...]
    bytes: int  # of `rows`, as they lie on the disk
    seconds: float
    images_per_second: float  # of the new rows, the loading of the model left out
    latency: Latency | None = None  # of the backbone, where it was asked for
    set_aside: tuple[SetAside, ...] = ()  # by a cluster, whose workers died of them
    remaining_rows: int = 0  # of the images asked for, in the parts of other runs

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
        self.n_threads = options.n_threads or n_cores()
        self.bad: list[BadImage] = []

    def open_store(self) -> StoreFolder:
        """Open or make the store."""
        return ensure_folder(self.path, library=__version__)

    def run(
        self,
        store: StoreFolder,
        new: NewFeatureSet,
        shapes: Sequence[TapShape],
        *,
        framing: Framing,
        source: Source,
        batch_size: int,
        crew: Crew | None = None,
    ) -> ExtractReport:
        """Record the items, make the feature set, do the shards that are missing.

        `crew` does them; None: this process, from `source`.
        """
        found = self._record_items(store)
        taps = [shape.tap for shape in shapes]
        folder, work = self._plan(store, new, shapes, found, framing=framing, source=source)
        began = time.perf_counter()
        crew = crew or SerialCrew(source, purpose=_purpose(new.key))
        pace = Pace(batch_size=batch_size, n_threads=self.n_threads, limit=LIMITS[new.dtype])
        done = self._do_shards(folder, work, crew, pace)
        seconds = time.perf_counter() - began
        return self._report(folder, taps, work, done, seconds)

    def _plan(
        self,
        store: StoreFolder,
        new: NewFeatureSet,
        shapes: Sequence[TapShape],
        found: Mapping[str, Sequence[FoundItem]],
        *,
        framing: Framing,
        source: Source,
    ) -> tuple[FeatureSetFolder, Work]:
        """Make the feature set and assign rows: the only part that other writers wait for."""
        taps = [shape.tap for shape in shapes]
        tried: dict[RowKey, bool] = {}
        while True:
            with self._locked(store.locks_path / f"{new.key}.lock", _purpose(new.key)):
                self._announce(store, new)
                folder = ensure_feature_set(store, new, shapes)
                sweep_partials(store, folder)
                work = plan_work(folder, framing, taps, found, options=self.options, tried=tried)
            if not work.untried:
                return folder, work
            tried |= {key: decodes(source, work.wanted[key], framing) for key in work.untried}

    def _locked(self, lock: Path, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Hold a lock, however long another process needs it; whose it is, is told."""

        def tell(holder: str) -> None:
            self.progress(Progress(stage="items", message=f"Waiting for: {holder}."))

        return exclusive(lock, purpose=purpose, timeout_s=_PATIENCE_S, on_wait=tell)

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
            with self._locked(lock, f"recording the items of {reader.name}"):
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

    def _do_shards(self, folder: FeatureSetFolder, work: Work, crew: Crew, pace: Pace) -> _Done:
        """Have this run's part of the tasks done."""
        tasks = [task for task in work.tasks if self.options.has_shard(task.shard)]
        total = sum(len(task.lines) for task in tasks)
        n_done = 0

        def count(n_rows: int) -> None:
            nonlocal n_done
            n_done += n_rows
            self.progress(Progress(stage="extract", done=n_done, total=total))

        def tell(message: str) -> None:
            self.progress(Progress(stage="extract", message=message))

        done = _Done(left=[task for task in work.tasks if not self.options.has_shard(task.shard)])
        self._leave_out(bad_rows(work, {}))
        outcomes = crew.do(folder, tasks, pace=pace, on_rows=count, tell=tell)
        with contextlib.closing(outcomes):
            for outcome in outcomes:
                self._leave_out(bad_rows(work, done.add(outcome), only_new=True))
        return done

    def _report(
        self,
        folder: FeatureSetFolder,
        taps: Sequence[str],
        work: Work,
        done: _Done,
        seconds: float,
    ) -> ExtractReport:
        wanted = set(work.wanted)
        reused = work.reused | (done.by_others & wanted)
        new = (done.by_us & wanted) - reused
        lines = ((r, task.removed) for task in done.left for r in task.lines)
        remaining = {row_key(r) for r, removed in lines if r["row"] not in removed} & wanted
        tail = find_tail(folder)
        per_row = sum(folder.taps[tap].bytes_per_row(folder.store_dtype.itemsize) for tap in taps)
        return ExtractReport(
            store=shown(self.path),
            feature_set=folder.key,
            name=folder.attributes["name"],
            backbone=str(folder.attributes["backbone"].get("name", "")),
            taps=tuple(taps),
            tail=0 if tail is None else tail.n_blocks,
            rows=len(reused) + len(new),
            new_rows=len(new),
            reused_rows=len(reused),
            bad=tuple(self.bad),
            bytes=(len(reused) + len(new)) * per_row,
            seconds=round(time.perf_counter() - self.began, 3),
            images_per_second=round(len(done.by_us) / seconds, 2) if done.by_us else 0.0,
            set_aside=tuple(done.set_aside),
            remaining_rows=len(remaining - reused - new),
        )


@dataclass(kw_only=True, slots=True)
class _Done:
    """What became of the tasks."""

    left: list[ShardTask]  # in the parts of other runs
    by_us: set[RowKey] = field(default_factory=set)
    by_others: set[RowKey] = field(default_factory=set)
    set_aside: list[SetAside] = field(default_factory=list)

    def add(self, outcome: Outcome) -> dict[RowKey, str]:
        """File the rows of one task; give those that were rejected, with reasons."""
        task = outcome.task
        if outcome.set_aside:
            images = sorted({f"{line['dataset']}/{line['path']}" for line in task.lines})
            self.set_aside.append(
                SetAside(shard=task.shard, images=tuple(images), reason=outcome.set_aside)
            )
            return {}
        lines = [line for line in task.lines if line["row"] not in task.removed]
        keys = {line["row"]: row_key(line) for line in lines}
        stored = self.by_us if outcome.is_ours else self.by_others
        stored.update(key for row, key in keys.items() if row not in outcome.rejected)
        return {keys[row]: why for row, why in outcome.rejected.items() if row in keys}


def _purpose(key: str) -> str:
    return f"extracting into feature set {key}"

"""Train a head from a store: seeded, resumable, the best weights kept and measured."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

import pyarrow as pa
import torch

from featstore import open as open_store
from featstore.api import Store
from featstore.errors import ConflictError, FormatError, InvalidInputError
from featstore.files import write_bytes, write_parquet
from featstore.types import Progress, ProgressCallback, ignore_progress
from heads import runs as folders
from heads.evaluate import Evaluation, measure_pairs
from heads.gallery import draw_pictures
from heads.loop import Loop
from heads.model import choose_device, save_model
from heads.runs import Run
from heads.selection import TEST, VAL, Pair, evenly
from heads.setup import Choices, Request, Setup, make_setup, request_from_json
from heads.supply import Supply, check_protocol

CHECKPOINT_S = 30.0  # at most that much work is lost by a kill

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
    seconds: float
    split: str  # what `metrics` were measured on: "test", else "val"
    images: int
    metrics: dict[str, float]
    intervals: dict[str, list[float] | None]
    note: str  # how the intervals were made
    pictures: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)  # path to reason

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def train(
    store: str | Path | Store,
    *,
    task: str | None = None,
    resume: Run | str | Path | None = None,
    device: str = "auto",
    runs: str | Path | None = None,
    taps: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: ProgressCallback = ignore_progress,
    **chosen: Unpack[Choices],
) -> RunReport:
    """Train a head on stored features, keep its best weights and measure them.

    Args:
        store: The store.
        task: What to learn, such as "depth"; not needed with `resume`.
        resume: An interrupted run that goes on as it was begun: its id, the start of one,
            "@last", or its folder. It ends with the numbers of an undisturbed run.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        runs: Folder of the runs and targets, where it is not the store's own.
        taps: Taps that the head reads; None: the head's own choice.
        options: Options of the head, the task and the loop by name, as values or as text.
        progress: Called with reports of progress.
        chosen: Head, features, rows and recipe: the fields of `heads.setup.Choices`.

    Returns:
        What was done, with the metrics of the test split; of the held-out part where there is no
        test split.

    Raises:
        InvalidInputError: Something asked for cannot be done, or the loss is not finite.
        NotFoundError: A store, name, tap, split or run does not exist.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    place = choose_device(device)
    if resume is not None:
        _refuse_changes({"task": task, "taps": taps, "options": options, **chosen})
        run = _resumable(opened, resume, runs)
        return _Training(opened, runs, place, progress).resume(run)
    if task is None:
        raise InvalidInputError("Nothing says what to learn. Name a task, such as --task depth.")
    request = Request(task=task, taps=tuple(taps or ()), options=dict(options or {}), **chosen)
    return _Training(opened, runs, place, progress).start(request)


def _refuse_changes(given: Mapping[str, Any]) -> None:
    """A resumed run keeps its recipe; what equals a default may be a command line's filling."""
    defaults = Request(task="")
    changed = [
        name
        for name, value in given.items()
        if value and name != "task" and value != getattr(defaults, name)
    ]
    if changed:
        raise InvalidInputError(
            f"A resumed run keeps what it was begun with, so {', '.join(changed)} cannot be given "
            "with --resume. Leave it out, or start a new run."
        )


def _resumable(store: Store, resume: Run | str | Path, runs: str | Path | None) -> Run:
    if isinstance(resume, Run):
        run = resume
    elif (Path(resume) / folders.RECORD).exists():
        run = folders.read_run(Path(resume))
    else:
        run = folders.find_run(store.path, str(resume), runs=runs)
    if run.is_finished:
        raise InvalidInputError(f"Run {run.run_id} is finished; start a new one to train longer.")
    if folders.is_held(run.path):
        raise ConflictError(f"Run {run.run_id} is still training; stop it first.")
    return run


class _Training:
    """One call of `train`: where it reads and writes, and whom it tells."""

    def __init__(
        self,
        store: Store,
        runs: str | Path | None,
        device: torch.device,
        progress: ProgressCallback,
    ) -> None:
        self._store = store
        self._runs = runs
        self._device = device
        self._progress = progress

    def start(self, request: Request) -> RunReport:
        """Train a new run."""
        folder = folders.writable_runs_folder(self._store.folder, self._runs)
        with _own_random_numbers(request.seed, self._device):
            setup = self._setup(request, folder, None)
            run_id = folders.new_run_id(setup.record["head"], setup.record["task"])
            path = folder / run_id
            created = datetime.now(UTC).isoformat(timespec="seconds")
            record = {"format": 1, "run_id": run_id, "created": created, **setup.record}
            path.mkdir(parents=True)
            with folders.held(path):
                write_parquet(path / folders.PAIRS, setup.selection.to_table())
                return self._run(path, setup, record)

    def resume(self, run: Run) -> RunReport:
        """Go on with an interrupted run."""
        request = request_from_json(run.record["command"])
        request = replace(request, feature_set=run.record["feature_sets"][0], backbone=None)
        with _own_random_numbers(request.seed, self._device), folders.held(run.path):
            setup = self._setup(request, run.path.parent, run.path)
            return self._run(run.path, setup, run.record)

    def _setup(self, request: Request, folder: Path, resumed_path: Path | None) -> Setup:
        in_store = self._store.is_writable and self._runs is None
        targets = self._store.folder.targets_path if in_store else folder / "targets"
        setup = make_setup(
            self._store,
            request,
            device=self._device,
            targets_path=targets,
            progress=self._progress,
            resumed_path=resumed_path,
        )
        for message in setup.messages:
            self._progress(Progress(stage="train", message=message))
        check_protocol(setup)
        return setup

    def _run(self, path: Path, setup: Setup, record: dict[str, Any]) -> RunReport:
        """Train in a folder that is held, and say in its record how that ended."""
        record = {**record, "status": folders.RUNNING, "device": str(self._device)}
        record.pop("error", None)
        folders.write_record(path, record)
        try:
            return self._train_and_measure(path, setup, record)
        except KeyboardInterrupt:
            folders.write_record(path, {**record, "status": folders.INTERRUPTED})
            how = f"Resume with: heads train --resume {path.name}{self._where(path)}"
            raise KeyboardInterrupt(how) from None
        except Exception as error:
            failed = {**record, "status": folders.FAILED, "error": str(error)}
            folders.write_record(path, failed)
            raise

    def _where(self, path: Path) -> str:
        runs = "" if self._runs is None else f" --runs {path.parent}"
        return f" --store {self._store.path}{runs}"

    def _train_and_measure(self, path: Path, setup: Setup, record: dict[str, Any]) -> RunReport:
        supply = Supply(setup)
        loop = Loop(setup.model, setup.recipe, supply, progress=self._progress)
        before_s = _restore(path, loop)
        start = time.perf_counter()

        def save() -> None:
            _write_checkpoint(path, loop, setup, before_s + time.perf_counter() - start)

        if not loop.is_done or loop.best_state is None:
            loop.run(save, is_due=_every(CHECKPOINT_S))
        seconds = before_s + time.perf_counter() - start
        if loop.is_stopped:
            text = f"Stopped early at step {loop.step}: no better loss since step {loop.best_step}."
            self._progress(Progress(stage="train", message=text))
        assert loop.best_state is not None
        setup.model.head.load_state_dict(loop.best_state)
        write_parquet(path / folders.CURVES, loop.curves_table())
        split, pairs = _measured_part(setup)
        result = None
        pictures: list[str] = []
        if pairs:
            result = measure_pairs(
                setup.model, setup.feed, pairs, setup.labels, progress=self._progress
            )
            _write_metrics(path, split, result)
            drawn = evenly(pairs, setup.recipe.loop.pictures)
            pictures = draw_pictures(path, setup.model, setup.feed, drawn, setup.labels)
        finished = _finished(record, setup, loop, seconds, result=result, split=split)
        folders.write_record(path, finished)
        self._refresh_index()
        return _report(path, finished, result, pictures)

    def _refresh_index(self) -> None:
        if self._store.is_writable and self._runs is None:
            from featstore.index import refresh

            refresh(self._store.path)


def _measured_part(setup: Setup) -> tuple[str, Sequence[Pair]]:
    """Give the test part, else the held-out part."""
    selection = setup.selection
    return (TEST, selection.test) if selection.test else (VAL, selection.val)


def _restore(path: Path, loop: Loop) -> float:
    """Take over the checkpoint where there is one; give the seconds trained so far."""
    file = path / folders.CHECKPOINT
    if not file.exists():
        return 0.0
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()  # checks the checksum of each part
        if wrong is not None:
            raise ValueError(wrong)
        state = torch.load(file, map_location="cpu", weights_only=True)
        loop.restore(state)
        return float(state["seconds"])
    except (RuntimeError, LookupError, ValueError, zipfile.BadZipFile, pickle.PickleError) as error:
        raise FormatError(
            f"{file} is damaged. Delete it to train this run from its first step."
        ) from error


def _write_checkpoint(path: Path, loop: Loop, setup: Setup, seconds: float) -> None:
    sink = io.BytesIO()
    torch.save({**loop.state(), "seconds": seconds}, sink)
    write_bytes(path / folders.CHECKPOINT, sink.getbuffer())
    if loop.best_state is not None:
        save_model(path, loop.best_state, setup.model.norm)


def _write_metrics(path: Path, split: str, result: Evaluation) -> None:
    lines = [
        {"split": split, "name": m.name, "value": m.value, "low": m.low, "high": m.high}
        for m in result.metrics
    ]
    write_parquet(path / folders.METRICS, pa.Table.from_pylist(lines, schema=METRICS_SCHEMA))
    split_column = pa.array([split] * result.per_image.num_rows)
    write_parquet(path / folders.PER_IMAGE, result.per_image.add_column(0, "split", split_column))


def _finished(
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


def _report(
    path: Path, record: Mapping[str, Any], result: Evaluation | None, pictures: Sequence[str]
) -> RunReport:
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
        seconds=record["seconds"],
        split=measured.get("split", ""),
        images=measured.get("images", 0),
        metrics={} if result is None else result.values(),
        intervals={} if result is None else result.intervals(),
        note=measured.get("note", ""),
        pictures=tuple(str(path / name) for name in pictures),
        left_out=dict(record["left_out"]),
    )


def _every(seconds: float) -> Callable[[], bool]:
    """Make a question that is true once every so many seconds."""
    last = time.monotonic()

    def is_due() -> bool:
        nonlocal last
        if time.monotonic() - last < seconds:
            return False
        last = time.monotonic()
        return True

    return is_due


@contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for the time of a training and leave the caller's random numbers as they were."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

"""Train heads from a store: seeded, resumable, the best weights kept and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

import torch

from featstore import open as open_store
from featstore.api import Store
from featstore.errors import ConflictError, InvalidInputError, NotFoundError
from featstore.remote.location import shown
from featstore.types import Progress, ProgressCallback, ignore_progress
from heads import runs as folders
from heads.drive import drive
from heads.model import choose_device
from heads.presets import find_preset
from heads.presets.use import data_formats, fill, with_preset
from heads.report import RunReport
from heads.runs import Run
from heads.setup import Choices, Request, Setup, make_setup, request_from_json
from heads.supply import Pass, check_protocol, pass_key
from heads.training import Training

_NAMED = {"task", "taps", "options"}  # arguments of `train` beside `Choices`
CHECKPOINT_S = 30.0  # at most that much work is lost by a kill


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepReport:
    """What training several heads did."""

    runs: tuple[RunReport | None, ...]  # in the order asked for; None where one failed
    errors: tuple[str | None, ...]  # why it failed
    n_passes: int  # over the data, that the heads shared

    @property
    def best(self) -> int | None:
        """The run of the lowest loss on the held-out part; None where nothing was held out."""
        losses = {
            number: run.best_loss
            for number, run in enumerate(self.runs)
            if run is not None and run.best_loss is not None
        }
        return min(losses, key=lambda number: losses[number], default=None)


def train(
    store: str | Path | Store,
    *,
    task: str | None = None,
    resume: Run | str | Path | None = None,
    device: str = "auto",
    cache: str = "auto",
    runs: str | Path | None = None,
    taps: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: ProgressCallback = ignore_progress,
    **chosen: Unpack[Choices],
) -> RunReport:
    """Train a head on stored features, keep its best weights and measure them.

    With `preset`, an experiment of a paper is repeated: what is not said here is as it was there;
    what differs, in the data too, is told and recorded.

    Args:
        store: The store.
        task: What to learn, such as "depth"; not needed with `resume` or `preset`.
        resume: An interrupted run that goes on as it was begun: its id, the start of one,
            "@last", or its folder. It ends with the numbers of an undisturbed run.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        cache: Where rows stay once they were read: "ram", "gpu", "none", or "auto" for the first
            of the device and the main memory of whose free part half is enough. It changes no
            number.
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
    session = _Session(store, runs, device, cache, progress)
    if resume is not None:
        _refuse_changes({"task": task, "taps": taps, "options": options, **chosen})
        training = session.open(_resumable(session.store, resume, runs))
    else:
        given = {"task": task, "taps": taps, "options": options, **chosen}
        training = session.new(make_request(session.store, given))
    (report,) = session.run([training])
    if report is None:
        assert training.error is not None
        raise training.error
    return report


def train_many(
    store: str | Path | Store,
    configs: Sequence[Mapping[str, Any]],
    *,
    device: str = "auto",
    cache: str = "auto",
    runs: str | Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> SweepReport:
    """Train several heads side by side: what is read once, all of them learn from.

    Each is a run of its own and ends with the numbers it would end with alone. Heads that want
    the same rows in the same order (features, split, seed and batch size) share a pass; others
    follow in a pass of their own. A head whose loss is not finite fails alone.

    Args:
        store: The store.
        configs: One a head: arguments of `train` by name, `task` among them.
        device: As in `train`.
        cache: As in `train`.
        runs: As in `train`.
        progress: Called with reports of progress.

    Raises:
        InvalidInputError: Something asked for cannot be done; no run was begun.
        NotFoundError: A store, name, tap or split does not exist; no run was begun.
        KeyboardInterrupt: Ctrl-C; runs that were begun can be resumed one by one.
    """
    if not configs:
        raise InvalidInputError("There is nothing to train: the list of configurations is empty.")
    session = _Session(store, runs, device, cache, progress)
    requests = []
    for config in configs:
        unknown = sorted(config.keys() - Choices.__annotations__.keys() - _NAMED)
        if unknown:
            raise InvalidInputError(
                f"A configuration has {', '.join(unknown)}. It takes task, taps, options and "
                f"{', '.join(Choices.__annotations__)}."
            )
        requests.append(make_request(session.store, config))
    trainings = [session.new(request) for request in requests]
    reports = session.run(trainings)
    errors = [None if each.error is None else str(each.error) for each in trainings]
    return SweepReport(runs=tuple(reports), errors=tuple(errors), n_passes=len(_by_pass(trainings)))


def make_request(store: Store, given: Mapping[str, Any]) -> Request:
    """Make a request of what was said, None being nothing; a preset fills in the rest."""
    said = {name: value for name, value in given.items() if value is not None}
    if "preset" in said:
        preset = find_preset(said["preset"], backbone=_backbone(store, said))
        said = fill(preset, said, data_formats(store, said.get("data")))
    if "task" not in said:
        raise InvalidInputError(
            "Nothing says what to learn. Name a task, such as --task depth, or a --preset."
        )
    said |= {name: tuple(said.get(name, ())) for name in ("taps", "holdout")}
    return Request(options=dict(said.pop("options", {})), **said)


def _backbone(store: Store, said: Mapping[str, Any]) -> str | None:
    """Name the backbone of the features that are meant; None where none or several are."""
    try:
        features = store.feature_set(said.get("feature_set"), backbone=said.get("backbone"))
    except (NotFoundError, InvalidInputError):  # said again once the preset is known
        return None
    return str(features.backbone.get("name", ""))


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
    if run.is_protocol:
        raise InvalidInputError(
            f"{run.run_id} is an {run.record['kind']}. Go on with it by "
            f"`heads protocol identity --resume {run.run_id}`."
        )
    if run.is_finished:
        raise InvalidInputError(f"Run {run.run_id} is finished; start a new one to train longer.")
    if folders.is_held(run.path):
        raise ConflictError(f"Run {run.run_id} is still training; stop it first.")
    return run


def _by_pass(trainings: Sequence[Training]) -> list[list[Training]]:
    """Put those together that share a pass, in the order of their first."""
    groups: dict[tuple[object, ...], list[Training]] = {}
    for training in trainings:
        groups.setdefault(pass_key(training.setup), []).append(training)
    return list(groups.values())


class _Session:
    """One call: where it reads and writes, and whom it tells."""

    def __init__(
        self,
        store: str | Path | Store,
        runs: str | Path | None,
        device: str,
        cache: str,
        progress: ProgressCallback,
    ) -> None:
        self.store = store if isinstance(store, Store) else open_store(store)
        self._runs = runs
        self._device = choose_device(device)
        self._cache = cache
        self._progress = progress

    def new(self, request: Request) -> Training:
        """Set up a new run; nothing of it is written yet."""
        folder = folders.writable_runs_folder(self.store.folder, self._runs)
        with _own_random_numbers(request.seed, self._device):
            setup = self._setup(request, folder, None)
            run_id = folders.new_run_id(setup.record["head"], setup.record["task"])
            created = datetime.now(UTC).isoformat(timespec="milliseconds")
            record = {"format": 1, "run_id": run_id, "created": created, **setup.record}
            return Training(setup, folder / run_id, record)

    def open(self, run: Run) -> Training:
        """Set up an interrupted run as it was begun."""
        request = request_from_json(run.record["command"])
        # What the task took from the data then: new images may bring new classes.
        options = {**run.record["options"]["task"], **request.options}
        request = replace(
            request,
            feature_set=run.record["feature_sets"][0],
            backbone=None,
            options=options,
            taps=tuple(run.record.get("named_taps", request.taps)),  # more may be stored by now
        )
        with _own_random_numbers(request.seed, self._device):
            setup = self._setup(request, run.path.parent, run.path)
            return Training(setup, run.path, {**run.record, "device": str(self._device)})

    def _setup(self, request: Request, folder: Path, resumed_path: Path | None) -> Setup:
        in_store = self.store.is_writable and self._runs is None
        targets = self.store.folder.targets_path if in_store else folder / "targets"
        setup = make_setup(
            self.store,
            request,
            device=self._device,
            targets_path=targets,
            progress=self._progress,
            resumed_path=resumed_path,
        )
        check_protocol(setup)
        return with_preset(setup, request)

    def run(self, trainings: Sequence[Training]) -> list[RunReport | None]:
        """Train, pass by pass, and measure; None where a training failed."""
        told = dict.fromkeys(text for training in trainings for text in training.setup.messages)
        for message in told:
            self._progress(Progress(stage="train", message=message))
        reports: dict[Path, RunReport] = {}
        try:
            for group in _by_pass(trainings):
                reports |= self._run_pass(group)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._how_to_resume(trainings)) from None
        self._refresh_index()
        return [reports.get(training.path) for training in trainings]

    def _run_pass(self, group: Sequence[Training]) -> dict[Path, RunReport]:
        shared = Pass([training.setup for training in group], cache=self._cache)
        with ExitStack() as held, torch.random.fork_rng(devices=_devices(self._device)):
            try:
                for training in group:
                    training.begin(shared.feed, held)
                drive(group, shared, checkpoint_s=CHECKPOINT_S, progress=self._progress)
                return {
                    training.path: self._finish(training, shared)
                    for training in group
                    if training.error is None
                }
            except BaseException as error:
                for training in group:
                    training.end_badly(error)
                raise

    def _finish(self, training: Training, shared: Pass) -> RunReport:
        loop = training.loop
        if loop.is_stopped:
            text = f"Stopped early at step {loop.step}: no better loss since step {loop.best_step}."
            self._progress(Progress(stage="train", message=text))
        return training.finish(shared.feed, self._progress)

    def _how_to_resume(self, trainings: Sequence[Training]) -> str:
        begun = [
            training.path
            for training in trainings
            if training.record.get("status") == folders.INTERRUPTED
        ]
        if not begun:
            return "Nothing is lost; start again."
        ids = " or ".join(path.name for path in begun)
        runs = "" if self._runs is None else f" --runs {begun[0].parent}"
        return f"Resume with: heads train --resume {ids} --store {shown(self.store.path)}{runs}"

    def _refresh_index(self) -> None:
        if self.store.is_writable and self._runs is None:
            from featstore.index import refresh

            refresh(self.store.path)


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


@contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for a while and leave the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=_devices(device)):
        torch.manual_seed(seed)
        yield

"""Everything that a protocol trains and measures, fold by fold, whatever of it is done already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.api import Store
from featstore.commands import extract_command
from featstore.errors import not_found
from featstore.skeleton import Skeleton
from featstore.types import Progress, ProgressCallback
from heads.adapt_modes import parts_of
from heads.feed import Feed
from heads.identity_images import Instance
from heads.keypoint_labels import KEYPOINTS
from heads.model import Model, load
from heads.protocol.animals import Animals, find_animals
from heads.protocol.base_runs import configs_of, describe, train_heads
from heads.protocol.bench import HeadBench, mean_feature
from heads.protocol.cells import Cell, CellFolder
from heads.protocol.design import Design, check_folds, choose_validation, make_design
from heads.protocol.findings import HeadRun
from heads.protocol.plan import Plan, plan_from_json
from heads.protocol.runner import Task, count_cells, run_task
from heads.runs import Run
from heads.tasks.pose import PoseTask


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """Everything that was measured, before anything is compared."""

    plan: Plan
    cells: tuple[Cell, ...]
    heads: tuple[HeadRun, ...]
    designs: Mapping[str, Design]  # of the held-out identities
    animals: Animals
    means: Mapping[str, np.ndarray]  # of the features of every identity, each of length 1
    skeleton: Skeleton
    messages: tuple[str, ...]
    jitters: tuple[str, ...]  # views of worse boxes that every test instance is measured in
    add_jitters: str  # the command that stores some; "" where nothing can


class Gathering:
    """One call: where it reads and writes, and what it has gathered."""

    def __init__(
        self,
        store: Store,
        run: Run,
        *,
        runs: str | Path | None,
        device: str,
        cache: str,
        progress: ProgressCallback,
    ) -> None:
        self._store, self._run, self._runs = store, run, runs
        self._device, self._cache, self._progress = device, cache, progress
        record = run.record
        self._plan = plan_from_json(record["plan"])
        self._asked = dict(record["asked"])
        features = store.feature_set(record["feature_sets"][0])
        self._features = features
        self._animals = find_animals(
            features,
            taps=self._asked.get("taps") or tuple(features.taps),
            kind=KEYPOINTS,
            data=self._asked.get("data"),
        )
        self._means: dict[str, np.ndarray] = {}
        self.messages: list[str] = []

    def check(self) -> None:
        """Refuse what cannot be done before anything is trained."""
        check_folds(self._plan.folds, tuple(self._animals.instances))
        for mode in self._plan.modes:
            parts_of(mode)
        known = self._animals.instances
        if self._plan.validation is not None and self._plan.validation not in known:
            raise not_found("identity", self._plan.validation, known)
        for number, fold in enumerate(self._plan.folds):
            for name in (*fold, self._validation(number)):
                self._design(name)

    def do(self) -> Gathered:
        """Train, adapt and measure what is not done yet."""
        cells: list[Cell] = []
        heads: list[HeadRun] = []
        designs: dict[str, Design] = {}
        skeleton = None
        counter = _Counter(self._progress, self._n_cells())
        for number, fold in enumerate(self._plan.folds):
            validation = self._validation(number)
            own = {name: self._design(name) for name in (*fold, validation)}
            designs |= {name: own[name] for name in fold}
            configs = configs_of(self._plan, number, validation, self._asked)
            trained = train_heads(
                self._store,
                configs,
                since=str(self._run.record["created"]),
                device=self._device,
                cache=self._cache,
                runs=self._runs,
                progress=self._progress,
            )
            for variant, run in trained.items():
                model = load(run, device=self._device)
                assert isinstance(model.task, PoseTask)
                skeleton = model.task.skeleton
                bench = self._bench(run, model, own, number)
                task = Task(
                    fold=number,
                    variant=variant,
                    bench=bench,
                    designs=own,
                    groups={
                        name: [pair.group for pair in self._animals.pairs(name)] for name in own
                    },
                    validation=validation,
                    jitters=self._jitters(),
                )
                found = run_task(self._plan, task, self._cells(), counter.step)
                cells += [*found["test"], *found["tuning"]]
                names = model.head.options.identities
                heads.append(
                    describe(
                        run, fold=number, variant=variant, validation=validation, training=names
                    )
                )
            self._tell_of_lacking(fold)
        assert skeleton is not None
        return Gathered(
            plan=self._plan,
            cells=tuple(cells),
            heads=tuple(heads),
            designs=designs,
            animals=self._animals,
            means=dict(self._means),
            skeleton=skeleton,
            messages=(*self.messages, *self._left_out()),
            jitters=self._jitters(),
            add_jitters=self._add_jitters(),
        )

    def _jitters(self) -> tuple[str, ...]:
        """List the views of worse boxes that show all test instances of all held-out identities."""
        views = set(self._animals.jittered)
        for name in (name for fold in self._plan.folds for name in fold):
            views &= self._animals.jitters(name, self._design(name).test).keys()
        return tuple(sorted(views))

    def _jittered(self, name: str) -> list[Instance]:
        found = self._animals.jitters(name, self._design(name).test)
        return [instance for view in self._jitters() for instance in found[view]]

    def _add_jitters(self) -> str:
        if self._features.is_foreign:
            return ""
        taps = self._asked.get("taps") or tuple(self._features.taps)
        return extract_command(self._features.folder, taps=taps, views=["jitter:2"])

    def _n_cells(self) -> int:
        plan = self._plan
        return sum(
            count_cells(plan, number, variant, {name: self._design(name) for name in fold})
            for number, fold in enumerate(plan.folds)
            for variant in plan.all_variants
        )

    def _cells(self) -> CellFolder:
        return CellFolder(self._run.path)

    def _validation(self, fold: int) -> str:
        plan = self._plan
        held_out = plan.folds[fold]
        if plan.validation is not None and plan.validation not in held_out:
            return plan.validation
        return choose_validation(self._animals.n_images(), held_out, plan.shots)

    def _design(self, name: str) -> Design:
        return make_design(
            name, self._animals.pairs(name), n_seeds=self._plan.n_seeds, seed=self._plan.seed
        )

    def _bench(self, run: Run, model: Model, designs: Mapping[str, Design], fold: int) -> HeadBench:
        feed = Feed(self._features, model.array_names, model.device)
        if not self._means:  # of frozen features: the same for every head
            for name, instances in self._animals.instances.items():
                self._means[name] = mean_feature(model, feed, instances)
        return HeadBench(
            run=run,
            model=model,
            feed=feed,
            instances=self._animals.instances,
            designs=designs,
            validation=self._validation(fold),
            jittered={name: self._jittered(name) for name in self._plan.folds[fold]},
        )

    def _tell_of_lacking(self, fold: Sequence[str]) -> None:
        for name in fold:
            design = self._design(name)
            lacking = [str(shots) for shots in self._plan.shots if not design.has(shots)]
            if lacking:
                self.messages.append(
                    f"{name} has {design.n_images} images beside its test half, so that "
                    f"{', '.join(lacking)} are left out."
                )

    def _left_out(self) -> Iterator[str]:
        for path, reason in sorted(self._animals.left_out.items()):
            yield f"{path}: {reason}"


class _Counter:
    """Tells how many cells of all are done."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def step(self) -> None:
        self._done += 1
        self._progress(Progress(stage="protocol", done=self._done, total=self._total))

"""Running a protocol's cells: tuned alike, never on what is measured, never twice."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from featstore.errors import FormatError, InvalidInputError
from heads.protocol.cells import READINGS, CellFolder, Outcome
from heads.protocol.design import ALL, make_design
from heads.protocol.plan import BASELINES, MAIN, Plan, Way, plan_from_json
from heads.protocol.runner import Task, best_lr, count_cells, run_task

PLAN = Plan(
    folds=(("fox", "hare"),),
    shots=(0, 2, ALL),
    modes=("token", "decoder"),
    inits=("mean", "random"),
    n_seeds=4,
    steps=7,
    n_tuning_seeds=2,
    lr_factors=(0.1, 0.3, 1.0),
)
QUICK = replace(PLAN, modes=("token",), inits=("mean",), shots=(0, 2), lr_factors=(0.3,))
BEST = {"token": 0.03, "decoder": 0.001}  # learning rates at which the fakes are nearest


@dataclass(frozen=True)
class Instance:
    image_key: str
    group: str


def outcome(distance, *, points=3):
    hits = {reading: int(distance <= 0.05) * points for reading in READINGS}
    counted = dict.fromkeys(READINGS, points)
    return Outcome(
        squares=points * distance**2, points=points, hits=hits, counted=counted, oks=0.5, score=1.0
    )


@dataclass
class FakeBench:
    """Comes nearer with more images, and with a learning rate near the best of its mode."""

    run_id: str = "run-1"
    fails_above: float = math.inf
    jobs: list = field(default_factory=list)

    def own_lr(self, mode):
        return 0.1 if mode == "token" else 0.01

    def parameters(self, mode):
        return {"token": 8, "decoder": 1000}[mode]

    def adapt(self, job):
        self.jobs.append(job)
        if job.lr is not None and job.lr > self.fails_above:
            raise InvalidInputError("The loss became nan.")
        wrong = 0.0 if job.lr is None else abs(math.log10(job.lr / BEST[job.mode]))
        return [
            [outcome(0.2 / (1 + len(support)) + 0.01 * wrong + 0.001 * seed) for _ in job.test]
            for seed, support in enumerate(job.supports)
        ]


def task(bench, *, sizes=(("fox", 20), ("hare", 6), ("cow", 10)), variant=MAIN):
    found = {
        name: [Instance(f"{name}{n}", f"{name}{n}") for n in range(count)] for name, count in sizes
    }
    return Task(
        fold=0,
        variant=variant,
        bench=bench,
        designs={name: make_design(name, each, n_seeds=4) for name, each in found.items()},
        groups={name: [one.group for one in each] for name, each in found.items()},
        validation="cow",
    )


def run(tmp_path, bench, plan=PLAN, **changes):
    told = []
    one = task(bench, **changes)
    found = run_task(plan, one, CellFolder(tmp_path), lambda: told.append(1))
    assert len(told) == count_cells(plan, 0, one.variant, one.designs)
    return found, len(told)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All of `PLAN`, done once: what was found, what was told, and which jobs it took."""
    bench = FakeBench()
    return (*run(tmp_path_factory.mktemp("whole"), bench), bench.jobs)


def test_every_way_is_done_on_every_held_out_identity(whole):
    found, n_told, _ = whole
    done = {
        (c.unit.identity, c.unit.way.mode, c.unit.way.init, c.unit.way.shots) for c in found["test"]
    }
    ways = {("token", "mean"), ("token", "random"), ("decoder", "mean")}
    expected = {
        (who, mode, init, shots)
        for who in ("fox", "hare")
        for mode, init in ways
        for shots in (0, 2, ALL)
        if (mode, shots) != ("decoder", 0)
    } | {(who, "token", init, 0) for who in ("fox", "hare") for init in BASELINES}
    assert done == expected
    assert n_told == len(found["test"]) + len(found["tuning"])


def test_only_the_validation_identity_chooses_and_all_modes_try_equally_many(whole):
    found, *_ = whole
    assert {cell.unit.identity for cell in found["tuning"]} == {"cow"}
    tried = {}
    for cell in found["tuning"]:
        way = cell.unit.way
        tried.setdefault((way.mode, way.init, way.shots), set()).add(cell.unit.lr)
    assert {len(rates) for rates in tried.values()} == {3}
    assert tried["token", "mean", 2] == {0.01, 0.03, 0.1}
    lrs = {(c.unit.way.mode, c.unit.lr) for c in found["test"] if c.unit.way.is_trained}
    assert lrs == {("token", 0.03), ("decoder", 0.001)}


def test_all_modes_learn_from_the_same_images(whole):
    *_, jobs = whole
    of_fox = [job for job in jobs if job.identity == "fox" and len(job.supports) == 4]
    assert len({job.test for job in jobs if job.identity == "fox"}) == 1
    assert len({job.supports for job in of_fox if len(job.supports[0]) == 2}) == 1


def test_nothing_random_is_done_once(whole):
    found, *_ = whole
    seeds = {
        (c.unit.way.init, c.unit.way.shots): len(c.outcomes)
        for c in found["test"]
        if c.unit.way.mode == "token"
    }
    assert seeds == {
        ("mean", 0): 1, ("mean", 2): 4, ("mean", ALL): 4,
        ("shared", 0): 1, ("nearest", 0): 1, ("best", 0): 1,
        ("random", 0): 4, ("random", 2): 4, ("random", ALL): 4,
    }  # fmt: skip
    base = next(c for c in found["test"] if not c.unit.way.is_trained)
    assert (base.parameters, base.unit.lr, base.unit.steps) == (0, None, 0)


def test_shots_that_an_identity_lacks_are_left_out_and_tuned_on_all_there_are(tmp_path):
    plan = replace(PLAN, shots=(0, 4), modes=("token",), inits=("mean",))
    bench = FakeBench()
    found, _ = run(tmp_path, bench, plan, sizes=(("fox", 20), ("hare", 6), ("cow", 6)))
    assert {(c.unit.identity, c.unit.way.shots) for c in found["test"]} == {
        ("fox", 0), ("hare", 0), ("fox", 4),
    }  # fmt: skip
    assert {c.unit.way.shots for c in found["tuning"]} == {ALL}


def test_a_resumed_protocol_does_only_what_is_missing(tmp_path):
    bench = FakeBench()
    first, _ = run(tmp_path, bench, QUICK)
    n_done = len(bench.jobs)
    sorted((tmp_path / "cells").glob("*.parquet"))[3].unlink()
    second, _ = run(tmp_path, bench, QUICK)
    assert len(bench.jobs) == n_done + 1
    timed = [[replace(cell, seconds=0) for cell in each["test"]] for each in (first, second)]
    assert timed[0] == timed[1]


@pytest.mark.parametrize("change", ["run_id", "steps", "seed"])
def test_a_cell_of_something_else_is_not_reused(tmp_path, change):
    run(tmp_path, FakeBench(), QUICK)
    bench = FakeBench(run_id="run-2" if change == "run_id" else "run-1")
    plan = replace(QUICK, steps=8) if change == "steps" else QUICK
    again = task(bench)
    if change == "seed":
        found = [Instance(f"fox{n}", f"fox{n}") for n in range(20)]
        other = make_design("fox", found, n_seeds=4, seed=1)
        again = replace(again, designs={**again.designs, "fox": other})
    run_task(plan, again, CellFolder(tmp_path), lambda: None)
    redone = {job.identity for job in bench.jobs}
    assert redone == ({"fox"} if change == "seed" else {"fox", "hare", "cow"})


def test_a_learning_rate_whose_loss_is_not_finite_loses(tmp_path):
    plan = replace(PLAN, modes=("token",), inits=("mean",), shots=(2,))
    found, _ = run(tmp_path, FakeBench(fails_above=0.02), plan)
    token = [c for c in found["tuning"] if c.unit.way.mode == "token"]
    assert {c.unit.lr for c in token if c.error} == {0.03, 0.1}
    assert best_lr([c for c in token if c.unit.way.shots == 2]) == 0.01


def test_where_every_learning_rate_fails_the_failure_stays_in(tmp_path):
    plan = replace(PLAN, modes=("token",), inits=("mean",), shots=(2,))
    found, _ = run(tmp_path, FakeBench(fails_above=0.0), plan)
    trained = [c for c in found["test"] if c.unit.way.is_trained]
    assert {(c.unit.lr, c.error) for c in trained} == {(0.01, "The loss became nan.")}
    assert {c.error for c in found["test"] if not c.unit.way.is_trained} == {None}


def test_other_variants_adapt_the_token_alone(tmp_path):
    plan = replace(PLAN, shots=(2,), lr_factors=(1.0,))
    found, _ = run(tmp_path, FakeBench(), plan, variant="film")
    assert {c.unit.way.mode for c in found["test"]} == {"token"}
    assert {c.unit.way.init for c in found["test"]} == {"mean", "random"}


def test_errors_and_hits_come_back_from_the_disk(whole):
    found, *_ = whole
    cell = next(
        c
        for c in found["test"]
        if c.unit.way == Way(variant=MAIN, mode="token", init="mean", shots=2)
    )
    wrong = 0.2 / 3 + 0.001 * np.arange(4)
    assert cell.errors().rmses_s() == pytest.approx(wrong)
    assert cell.hits("pck@0.05").mean() == 0.0
    near = next(c for c in found["test"] if c.unit.way.shots == ALL and c.unit.identity == "fox")
    assert near.hits("pck@0.05").mean() == 1.0
    assert len(near.groups) == len(near.outcomes[0]) == 10


def test_instances_of_which_a_reading_tells_nothing_do_not_count(whole):
    found, *_ = whole
    cell = found["test"][0]
    unknown = replace(cell.outcomes[0][0], counted=dict.fromkeys(READINGS, 0))
    shorter = replace(cell, outcomes=((unknown, *cell.outcomes[0][1:]),))
    assert len(shorter.hits("pck@0.05box").counts_i) == len(cell.groups) - 1


def test_a_damaged_cell_says_what_to_delete(tmp_path):
    run(tmp_path, FakeBench(), replace(QUICK, shots=(0,)))
    path = sorted((tmp_path / "cells").glob("*.parquet"))[0]
    path.write_bytes(b"not parquet")
    with pytest.raises(FormatError, match="Delete it"):
        CellFolder(tmp_path).read(path.stem)


def test_a_plan_survives_json_and_refuses_nonsense():
    plan = replace(PLAN, variants={"film": {"injection": "film"}})
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for wrong in (
        {"steps": 0}, {"n_seeds": 0}, {"seed": -1}, {"modes": ()}, {"shots": (1, 1)},
        {"lr_factors": (0.0,)}, {"variants": {MAIN: {}}},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            replace(PLAN, **wrong)

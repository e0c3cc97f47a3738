"""Training from a small store whose depth is a linear function of the features."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch

import featstore
import heads
from featstore.errors import (
    ConflictError,
    FormatError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from featstore.types import ignore_progress
from heads import labels as label_sources
from heads.drive import deferred_interrupt
from heads.loop import LoopOptions, Recipe
from heads.runs import find_run, held, list_runs, read_run
from heads.setup import Request, make_setup
from heads.supply import Pass, Supply
from tests.fakes import FakeReader, content, fake_extract

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"queries": 4, "checks": 4, "pictures": 0}  # 32 x 32 outputs, 4 looks at what is held out
N_STEPS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("train") / "features.zarr"
    fake_extract(path, [FakeReader(40)])
    return path


@pytest.fixture
def store(made, tmp_path):
    """A copy, so that no test sees another's runs."""
    return shutil.copytree(made, tmp_path / "features.zarr")


def learn(store, **changes):
    options = {**SMALL, **changes.pop("options", {})}
    chosen = {"task": "depth", "steps": N_STEPS, "batch_size": 8, "device": "cpu", **changes}
    return heads.train(store, options=options, **chosen)


def weights(report):
    return safetensors.numpy.load_file(Path(report.path) / "head.safetensors")


def same(one, other):
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_the_public_names_are_functions_even_after_their_files_were_imported():
    import heads.evaluate
    import heads.predict
    import heads.train

    assert all(callable(getattr(heads, name)) for name in heads.__all__)


def test_a_head_learns_what_is_there_to_learn(store):
    report = learn(store, steps=150)
    truth = [FakeReader().depth(f"{number:05d}.npy") for number in range(0, 40, 5)]
    spread = np.std([depth.mean() for depth in truth])
    assert report.metrics["rmse"] < 0.3 * spread
    assert report.split == "test"
    assert report.images == 8
    low, high = report.intervals["rmse"]
    assert low <= report.metrics["rmse"] <= high


def test_evaluating_again_gives_the_same_numbers(store):
    report = learn(store)
    again = heads.evaluate(report.path, device="cpu")
    assert again.metrics == report.metrics
    assert again.intervals == report.intervals
    assert heads.evaluate("@last", store=store, device="cpu").metrics == report.metrics


def test_the_held_out_part_and_the_train_part_can_be_measured_too(store):
    report = learn(store)
    record = read_run(Path(report.path)).record
    for part in ("train", "val"):
        assert (
            heads.evaluate(report.path, split=part, device="cpu").images == record["images"][part]
        )
    with pytest.raises(NotFoundError, match="Splits that have some"):
        heads.evaluate(report.path, split="tset", device="cpu")
    with pytest.raises(NotFoundError, match="name its store"):
        heads.evaluate(report.run_id)


def test_a_moved_store_evaluates_its_runs(store, tmp_path):
    report = learn(store)
    moved = tmp_path / "elsewhere.zarr"
    store.rename(moved)
    assert heads.evaluate(moved / "runs" / report.run_id).metrics == report.metrics


def test_one_seed_gives_one_result_and_another_seed_another(store):
    first, again, other = (learn(store, seed=seed) for seed in (3, 3, 4))
    assert same(weights(first), weights(again))
    assert first.metrics == again.metrics
    assert not same(weights(first), weights(other))


def test_training_leaves_the_callers_random_numbers_alone(store):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    learn(store, steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_folder_holds_all_that_is_promised(store):
    report = learn(store, options={"pictures": "3"})
    path = Path(report.path)
    record = json.loads((path / "run.json").read_text())
    assert record["status"] == "done"
    assert record["parameters"] == 50 * 8 + 4886
    assert record["dead_parameters"] == 2 * (8 + 8)
    assert record["labels"] == {"kind": "depth", "data": None}
    assert record["protocol"]["label_sources"] == ["exact"]
    assert record["images"] == {"train": 28, "val": 4, "test": 8}
    assert record["validation"]["how"] == "groups"
    assert record["plan"]["architecture"] == "fake_net"
    assert {"torch", "numpy", "python", "featstore"} <= set(record["versions"])
    metrics = pq.read_table(path / "metrics.parquet").to_pylist()
    assert {m["name"]: m["value"] for m in metrics} == report.metrics
    assert {m["split"] for m in metrics} == {"test"}
    curves = pq.read_table(path / "curves.parquet").to_pylist()
    assert [c["step"] for c in curves if c["split"] == "train"] == list(range(1, N_STEPS + 1))
    for name in ("loss", "rmse"):
        steps = [c["step"] for c in curves if (c["split"], c["name"]) == ("val", name)]
        assert steps == [3, 6, 9, 12]
    assert len(list((path / "pictures").glob("*.png"))) == len(report.pictures) == 3


def test_metrics_follow_from_the_sums_of_each_image(store):
    report = learn(store)
    table = pq.read_table(Path(report.path) / "per_image.parquet")
    assert table.num_rows == 8
    n, squared = (table[name].to_numpy() for name in ("n_pixels", "sum_squared_error"))
    assert np.sqrt(squared / n).mean() == pytest.approx(report.metrics["rmse"], rel=1e-12)


class Stop:
    """A progress callback that acts like Ctrl-C after some steps."""

    def __init__(self, step):
        self.step = step

    def __call__(self, report):
        if report.stage == "train" and report.total and report.done == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3, 7, 12])
def test_an_interrupted_run_resumes_to_the_numbers_of_an_undisturbed_one(store, step):
    undisturbed = learn(store)
    with pytest.raises(KeyboardInterrupt, match=r"heads train --resume deap-depth-"):
        learn(store, progress=Stop(step))
    run = list_runs(store)[-1]
    assert run.status == "interrupted"
    report = heads.train(store, resume="@last", device="cpu")
    assert report.run_id == run.run_id
    assert same(weights(undisturbed), weights(report))
    assert report.metrics == undisturbed.metrics
    assert report.best_step == undisturbed.best_step
    mine, theirs = (
        pq.read_table(Path(one.path) / "curves.parquet") for one in (report, undisturbed)
    )
    assert mine.equals(theirs)
    assert read_run(run.path).status == "done"


def test_a_store_that_has_grown_does_not_change_what_a_resumed_run_learns_from(store):
    undisturbed = learn(store)
    with pytest.raises(KeyboardInterrupt):
        learn(store, progress=Stop(7))
    fake_extract(store, [FakeReader(10, name="more", seed=1)])
    assert same(weights(undisturbed), weights(heads.train(store, resume="@last", device="cpu")))


KILLED = """
import sys, time
import torch
torch.set_num_threads(1)
import heads, heads.train
sys.modules["heads.train"].CHECKPOINT_S = 0.0  # after every step
def tell(report):
    if report.stage == "train" and report.total:
        print(report.done, flush=True)
        time.sleep(0.05)
heads.train(sys.argv[1], task="depth", steps=20, batch_size=8, device="cpu",
            options={"queries": 4, "checks": 4, "pictures": 0}, progress=tell)
"""


def test_a_killed_run_is_interrupted_and_resumes_exactly(store):
    command = [sys.executable, "-c", KILLED, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert "12\n" in child.stdout
        child.kill()
    run = list_runs(store)[-1]
    assert run.status == "interrupted"
    assert 11 <= torch.load(run.path / "checkpoint.pt", weights_only=True)["step"] < 20
    resumed = heads.train(store, resume=run.run_id, device="cpu")
    assert same(weights(resumed), weights(learn(store, steps=20)))


def press_twice():
    with deferred_interrupt() as is_asked:
        assert not is_asked()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert is_asked()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_ctrl_c_waits_for_the_end_of_a_step_and_a_second_one_does_not():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_final_norm_is_applied_to_block_outputs_and_that_is_recorded(store):
    normed = learn(store, taps=["block:0"])
    raw = learn(store, taps=["block:0"], tap_norm="none")
    last = learn(store, taps=["norm"])
    records = [read_run(Path(one.path)).record for one in (normed, raw, last)]
    assert [record["normed_taps"] for record in records] == [["block:0"], [], []]
    assert [record["tap_norm"] for record in records] == ["final", "none", "final"]
    assert not same(weights(normed), weights(raw))
    assert "final_norm.weight" in weights(normed)
    assert heads.evaluate(normed.path, device="cpu").metrics == normed.metrics


def test_a_loaded_head_needs_no_store(store, tmp_path):
    report = learn(store, taps=["block:0"])
    expected = heads.load(report.path)
    shutil.move(report.path, tmp_path / "kept")
    shutil.rmtree(store)
    tokens = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float16)
    loaded = heads.load(tmp_path / "kept")
    np.testing.assert_array_equal(
        loaded.predict({"block:0": tokens}), expected.predict({"block:0": torch.from_numpy(tokens)})
    )
    with pytest.raises(NotFoundError, match="reads 'block:0'"):
        loaded.predict({"norm": tokens})


def test_damaged_weights_are_named(store):
    report = learn(store, steps=1)
    path = Path(report.path) / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"head\.safetensors is damaged"):
        heads.load(report.path)


def test_training_stops_early_and_keeps_the_best(store):
    messages = []
    report = learn(
        store,
        lr=1e-30,  # nothing is learned, so that the first look stays the best
        options={"checks": 20, "patience": 3},
        progress=lambda each: messages.append(each.message),
    )
    assert (report.steps, report.best_step) == (4, 1)
    assert any("Stopped early at step 4" in message for message in messages)


def test_with_nothing_held_out_the_last_weights_are_kept(store):
    report = learn(store, val_fraction=0)
    assert report.best_step == report.steps == N_STEPS


def test_epochs_count_whole_batches(store):
    assert learn(store, steps=None, epochs=2, val_fraction=0).steps == 2 * (32 // 8)


def test_a_batch_is_never_larger_than_what_there_is(store):
    report = learn(store, batch_size=1000, steps=2)
    assert read_run(Path(report.path)).record["training"]["batch_size"] == 28


def test_a_loss_that_is_not_finite_ends_the_run_with_a_clear_error(store):
    with pytest.raises(InvalidInputError, match=r"The loss became .* at step \d+ .*--lr"):
        learn(store, lr=1e30)
    run = list_runs(store)[-1]
    assert run.status == "failed"
    assert "The loss became" in run.record["error"]


def test_without_a_test_split_the_held_out_part_is_measured(tmp_path):
    class OnlyTrain(FakeReader):
        def items(self):
            return [item for item in super().items() if item.splits == ("train",)]

    fake_extract(tmp_path / "s.zarr", [OnlyTrain(20)])
    report = learn(tmp_path / "s.zarr", steps=2)
    assert report.split == "val"
    assert report.images > 0


def test_labels_of_another_data_set_are_learned_by_image(store, monkeypatch):
    class Doubled(FakeReader):
        def depth(self, path):
            return 2 * super().depth(path)

        def read_image(self, item):
            return FakeReader().read_image(item)

    reader = Doubled(40, name="doubled")
    monkeypatch.setattr(label_sources, "open_dataset", lambda text: reader)
    own = learn(store, steps=60)
    other = learn(store, steps=60, data="fake:doubled")
    record = read_run(Path(other.path)).record
    assert record["labels"] == {"kind": "depth", "data": "fake:doubled"}
    assert heads.evaluate(other.path, device="cpu").metrics == other.metrics
    crossed = heads.evaluate(own.path, data="fake:doubled", device="cpu")
    assert crossed.metrics["absrel"] == pytest.approx(0.5, abs=0.1)
    assert other.metrics["absrel"] < 0.35


def test_equal_images_share_a_row_and_show_their_labels_in_turn(tmp_path):
    class Doubled(FakeReader):
        def depth(self, path):
            return 2 * super().depth(path)

        def read_image(self, item):
            return FakeReader().read_image(item)

    fake_extract(tmp_path / "s.zarr", [FakeReader(10), Doubled(10, name="doubled")])
    setup = make_setup(
        featstore.open(tmp_path / "s.zarr"),
        Request(task="depth", val_fraction=0, batch_size=4, options=SMALL),
        device=torch.device("cpu"),
        targets_path=tmp_path / "targets",
        progress=ignore_progress,
    )
    shared = Pass([setup], cache="none")
    supply = Supply(setup, shared.feed)
    assert len(setup.selection.train) == 16
    assert shared.batches_per_epoch == 2  # of 8 rows
    shown = []
    for epoch in (0, 1):
        batches = [supply.batch(each) for each in shared.rest_of_epoch(2 * epoch)]
        shown.append({pair.row: pair.dataset for batch in batches for pair in batch.pairs})
        for batch in batches:
            depths = [
                (2 if pair.dataset == "doubled" else 1) * FakeReader().depth(pair.path).mean()
                for pair in batch.pairs
            ]
            found = batch.targets["depth"].mean(dim=(1, 2)).tolist()
            assert found == pytest.approx(depths, rel=1e-3)
    assert all({shown[0][row], shown[1][row]} == {"fake", "doubled"} for row in shown[0])


def test_bad_labels_are_left_out_and_listed(tmp_path):
    class Cropped(FakeReader):
        def depth(self, path):
            depth = super().depth(path)
            return depth[:-1] if path in ("00005.npy", "00006.npy") else depth

        def read_image(self, item):
            return FakeReader().read_image(item)

    fake_extract(tmp_path / "s.zarr", [Cropped(20)])
    report = learn(tmp_path / "s.zarr", steps=2)
    assert set(report.left_out) == {"00005.npy", "00006.npy"}
    assert "31x48 and the image is 32x48" in report.left_out["00005.npy"]
    assert report.images == 3


def test_a_protocol_that_does_not_fit_is_refused_before_training(store):
    with pytest.raises(InvalidInputError, match=r"480 x 640"):
        learn(store, options={"crop": "eigen"})
    assert list_runs(store) == []


def test_a_read_only_store_is_trained_from_into_another_folder(store, tmp_path, monkeypatch):
    monkeypatch.setattr("featstore.store.os.access", lambda path, mode: False)
    before = sorted(path for path in store.rglob("*") if ".locks" not in path.parts)
    with pytest.raises(StorageError, match="--runs DIR"):
        learn(store)
    runs = tmp_path / "mine"
    report = learn(store, runs=runs)
    assert Path(report.path).parent == runs
    assert (runs / "targets").is_dir()
    assert sorted(path for path in store.rglob("*") if ".locks" not in path.parts) == before
    found = find_run(store, "@last", runs=runs)
    assert heads.evaluate(found, device="cpu").metrics == report.metrics


def test_training_changes_nothing_but_runs_targets_and_index(store):
    before = content(store)
    learn(store, steps=1)
    assert content(store) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "detph"}, r"Unknown task 'detph'. Did you mean 'depth'"),
        ({"head": "daep"}, r"Unknown head 'daep'. Did you mean 'deap'"),
        ({"taps": ["block:3"]}, r"Unknown tap 'block:3'.*featstore extract .*--taps block:3"),
        ({"taps": ["norm.mean"]}, r"a dense tap; this one is pooled"),
        ({"taps": ["blok"]}, r"block:N, stage:N or norm"),
        ({"taps": ["norm", "block:0"]}, r"exactly one tap"),
        ({"feature_set": "zzz"}, r"Unknown feature set 'zzz'"),
        ({"backbone": "fkae"}, r"Did you mean 'fake'"),
        ({"options": {"quereis": 3}}, r"Unknown option 'quereis'. Did you mean 'queries'"),
        ({"options": {"schedule": "step"}}, r"one of constant, cosine"),
        ({"options": {"patience": "-1"}}, r"`patience` must be at least 0"),
        ({"tap_norm": "batch"}, r"`tap_norm` must be one of final, none"),
        ({"epochs": 1}, r"one of the two"),
        ({"batch_size": 0}, r"`batch_size` must be at least 1"),
        ({"seed": -1}, r"`seed` must be 0 or more"),
        ({"lr": 0.0}, r"`lr` must be a positive number"),
        ({"device": "gpu"}, r"auto, cpu, cuda"),
        ({"device": "mps"}, r"one that this machine has"),
        ({"task": None}, r"--task depth"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence_and_nothing_is_left(store, changes, message):
    with pytest.raises((InvalidInputError, NotFoundError), match=message):
        learn(store, **changes)
    assert list_runs(store) == []


def test_a_resumed_run_keeps_its_recipe(store):
    with pytest.raises(KeyboardInterrupt):
        learn(store, progress=Stop(3))
    with pytest.raises(InvalidInputError, match="steps, lr cannot be given"):
        heads.train(store, resume="@last", steps=50, lr=0.1, seed=0, val_fraction=0.1)
    with held(list_runs(store)[-1].path), pytest.raises(ConflictError, match="still training"):
        heads.train(store, resume="@last")


def test_a_damaged_checkpoint_is_named(store):
    with pytest.raises(KeyboardInterrupt):
        learn(store, progress=Stop(3))
    path = list_runs(store)[-1].path / "checkpoint.pt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"broken", b"", whole[:-50], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"checkpoint\.pt is damaged"):
            heads.train(store, resume="@last", device="cpu")
    path.unlink()
    assert same(weights(heads.train(store, resume="@last", device="cpu")), weights(learn(store)))


def test_a_finished_run_is_not_resumed(store):
    learn(store, steps=1)
    with pytest.raises(InvalidInputError, match="is finished"):
        heads.train(store, resume="@last")


def recipe(schedule, **options):
    loop = LoopOptions(schedule=schedule, **options)
    return Recipe(steps=100, batch_size=4, lr=0.5, weight_decay=0.0, seed=0, loop=loop)


def test_the_learning_rate_is_constant_unless_asked():
    assert {recipe("constant").lr_at(step) for step in range(100)} == {0.5}
    cosine = [recipe("cosine").lr_at(step) for step in range(101)]
    assert cosine[0] == 0.5
    assert cosine[50] == pytest.approx(0.25)
    assert cosine[100] == pytest.approx(0.0)
    assert cosine == sorted(cosine, reverse=True)
    poly = [recipe("poly").lr_at(step) for step in range(101)]
    assert (poly[0], poly[100]) == (0.5, 0.0)
    assert poly[60] == pytest.approx(0.5 * 0.4**0.9)
    cycle = [recipe("onecycle").lr_at(step) for step in range(101)]
    assert (cycle[0], cycle[30], cycle[100]) == pytest.approx((0.02, 0.5, 0.0002))
    assert cycle[:31] == sorted(cycle[:31])
    assert cycle[30:] == sorted(cycle[30:], reverse=True)


def test_a_warm_up_rises_evenly_and_gives_way_to_the_schedule():
    plain, warm = recipe("poly"), recipe("poly", warmup=10)
    shares = [warm.lr_at(step) / plain.lr_at(step) for step in range(20)]
    assert shares == pytest.approx([min(1, step / 10) for step in range(20)])
    for name in ("warmup", "clip"):
        with pytest.raises(InvalidInputError, match=f"`{name}` must be at least 0"):
            LoopOptions(**{name: -1})


def test_clipping_shortens_long_gradients_only(store):
    plain, same_as_plain = learn(store, steps=2), learn(store, steps=2, options={"clip": 1e6})
    assert same(weights(plain), weights(same_as_plain))
    # AdamW does not see the length of gradients, until they come near its epsilon.
    assert not same(weights(plain), weights(learn(store, steps=2, options={"clip": 1e-9})))


def test_runs_that_differ_in_their_seed_share_prepared_targets(store):
    learn(store, seed=0, steps=1)
    stages = []
    learn(store, seed=1, steps=1, progress=lambda each: stages.append(each.stage))
    assert "train" in stages
    assert "labels" not in stages


@pytest.mark.parametrize(
    ("head", "options", "lr"),
    [
        ("deap", {"queries": 4}, 1e-3),
        ("maxa", {"queries": 4}, 1e-3),
        ("bicubic", {"queries": 4}, 1e-3),
        ("self_attention", {}, 1e-3),
        ("linear", {"size": 32}, 1e-2),
    ],
)
def test_every_head_learns_at_a_rate_of_its_own_unless_one_is_named(store, head, options, lr):
    options = {**options, "checks": 4, "pictures": 0, "patience": 0}
    common = {"task": "depth", "head": head, "steps": 60, "batch_size": 8, "device": "cpu"}
    report = heads.train(store, options=options, **common)
    assert read_run(Path(report.path)).record["options"]["train"]["lr"] == lr
    losses = pq.read_table(Path(report.path) / "curves.parquet").to_pylist()
    train = [line["value"] for line in losses if line["split"] == "train"]
    assert np.mean(train[-5:]) < 0.9 * np.mean(train[:5])
    assert heads.evaluate(report.path).metrics["rmse"] == pytest.approx(report.metrics["rmse"])
    named = heads.train(store, options=options, lr=2e-3, **{**common, "steps": 2})
    assert read_run(Path(named.path)).record["options"]["train"]["lr"] == 2e-3

"""The whole way through the real commands: a real (tiny, random) backbone, rooms, a real head."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cli.common import exit_code
from cli.featstore_app import featstore
from cli.heads_app import heads

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"featstore": featstore, "heads": heads}
BACKBONE = "vit_tiny_patch16_224.augreg_in21k"
N_IMAGES = 50  # ten scenes, two of them to test: an interval needs two
ROOMS = f"rooms:n={N_IMAGES},seed=0,size=60x80"
SHAPE = ["--backbone", BACKBONE, "--image-size", "64", "--device", "cpu"]
TAPS = ["--taps", "block:5,norm,norm.cls"]


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def call(program, *args):
    """Run a command in this process, which has torch loaded already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(PROGRAMS[program], [str(arg) for arg in args])
    return Done(code, out.getvalue(), err.getvalue())


def ok(program, *args):
    done = call(program, *args)
    assert done.code == 0, done.err
    return done


def start(program, *args):
    """Start a command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"cli.{program}_app", *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def content(store):
    """Hash of every file that is part of the store's content: not the index, runs or locks."""
    left_out = {"index.duckdb", "runs", "targets", ".locks"}
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.relative_to(store).parts[0] not in left_out
    }


@pytest.fixture(scope="session")
def model():
    """The backbone as timm makes it, its random weights spread enough to tell images apart."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(BACKBONE, pretrained=False, num_classes=0, img_size=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="session")
def weights(model, tmp_path_factory):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def words(weights):
    """Options of `extract` without the data and the store."""
    return [*SHAPE, *TAPS, "--weights", str(weights)]


@pytest.fixture(scope="session")
def made(words, tmp_path_factory):
    """A store made by `featstore extract`, and what the command reported."""
    path = tmp_path_factory.mktemp("end_to_end") / "features.zarr"
    words = [*words, "--data", ROOMS, "--store", path, "--json"]
    return path, ok("featstore", "extract", *words).json


@pytest.fixture(scope="session")
def store(made):
    return made[0]


@pytest.fixture(scope="session")
def trained(store):
    words = ["--task", "depth", "--steps", 20, "--batch-size", 4, "--device", "cpu"]
    words += ["--set", "patience=0"]  # all 20 steps, whatever they learn
    words += ["--set", "pictures=0"]
    return ok("heads", "train", *words, "--store", store, "--json").json


@pytest.fixture
def copy(store, tmp_path):
    """A store of one's own to damage."""
    return Path(shutil.copytree(store, tmp_path / "copy.zarr"))


# Extraction


def test_extract_reports_what_it_did(made):
    _, report = made
    for name in ("store", "feature_set", "backbone", "bytes", "seconds", "images_per_second"):
        assert report[name], name
    counts = ("rows", "new_rows", "reused_rows", "bad_images")
    assert [report[name] for name in counts] == [N_IMAGES, N_IMAGES, 0, 0]


def test_extracting_again_redoes_nothing(words, copy):
    before = content(copy)
    report = ok("featstore", "extract", *words, "--data", ROOMS, "--store", copy, "--json").json
    assert (report["new_rows"], report["reused_rows"]) == (0, N_IMAGES)
    assert content(copy) == before
    told = ok("featstore", "extract", *words, "--data", ROOMS, "--store", copy).out
    assert "images/s" not in told  # nothing ran, so it had no rate


def test_taps_views_and_images_are_added_to_what_is_there(words, copy):
    before = content(copy)
    more = [
        *words,
        "--data",
        ROOMS,
        "--store",
        copy,
        "--view",
        "plain",
        "--view",
        "hflip",
        "--json",
    ]
    more[more.index("--taps") + 1] = "block:2,norm"
    report = ok("featstore", "extract", *more).json
    assert report["rows"] == 2 * N_IMAGES
    after = content(copy)
    kept = [name for name in before if not name.endswith("zarr.json")]  # arrays have grown
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    key = report["feature_set"]
    assert feature_set_path(copy).name == key


def test_a_dry_run_writes_nothing(words, tmp_path):
    store = tmp_path / "none.zarr"
    guess = ok(
        "featstore", "extract", *words, "--data", ROOMS, "--store", store, "--dry-run", "--json"
    ).json
    assert not store.exists()
    # Two dense taps of 16 patch tokens and one CLS token, one pooled; 192 wide, 2 bytes each.
    assert guess["bytes_per_image"] == (2 * 17 + 1) * 192 * 2
    assert guess["bytes"] == N_IMAGES * guess["bytes_per_image"]


def test_an_image_that_does_not_decode_is_left_out_and_tried_again(words, tmp_path):
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "good.png")
    Image.fromarray(pixels[::-1]).save(photos / "bad.png")
    whole = (photos / "bad.png").read_bytes()
    (photos / "bad.png").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.jpg").write_bytes(b"")
    words = [*words, "--data", f"folder:{photos}", "--json", "--store", tmp_path / "s.zarr"]
    done = call("featstore", "extract", *words)
    assert done.code == 3
    assert (done.json["rows"], done.json["bad_images"]) == (1, 2)
    assert "bad.png" in done.err
    assert "empty.jpg" in done.err
    (photos / "bad.png").write_bytes(whole)
    (photos / "empty.jpg").unlink()
    assert ok("featstore", "extract", *words).json["new_rows"] == 1
    failing = call(
        "featstore", "extract", *words[:-1], tmp_path / "t.zarr", "--on-bad-image", "fail"
    )
    assert failing.code == 0
    (photos / "bad.png").write_bytes(b"no image")
    failing = call(
        "featstore", "extract", *words[:-1], tmp_path / "u.zarr", "--on-bad-image", "fail"
    )
    assert failing.code == 1
    assert "bad.png" in failing.err


def test_ctrl_c_says_how_to_go_on_and_a_rerun_ends_with_the_same_bytes(words, store, tmp_path):
    other = tmp_path / "features.zarr"
    process = start("featstore", "extract", *words, "--data", ROOMS, "--store", other)
    wait_for(lambda: list(other.glob("items/*")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130)  # 0: it was done before the signal came
    if process.returncode == 130:
        assert "run the same command again" in err
        assert "Traceback" not in err
    ok("featstore", "extract", *words, "--data", ROOMS, "--store", other)
    assert content(other) == content(store)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_a_random_moment_a_rerun_ends_with_the_same_bytes(words, store, tmp_path, seed):
    other = tmp_path / "features.zarr"
    process = start("featstore", "extract", *words, "--data", ROOMS, "--store", other)
    wait_for(other.exists, process)
    time.sleep(np.random.default_rng(seed).uniform(0, 0.6))
    process.kill()
    process.communicate()
    ok("featstore", "extract", *words, "--data", ROOMS, "--store", other)
    assert content(other) == content(store)


def test_sql_answers_while_an_extraction_is_running(words, tmp_path):
    other = tmp_path / "features.zarr"
    process = start("featstore", "extract", *words, "--data", ROOMS, "--store", other)
    wait_for(lambda: list(other.glob("feature_sets/*/zarr.json")), process)
    n_answers = 0
    while process.poll() is None:
        found = ok("featstore", "sql", "select count(*) as n from rows", "--store", other, "--json")
        assert 0 <= found.json["rows"][0]["n"] <= N_IMAGES
        n_answers += 1
    process.communicate()
    assert process.returncode == 0
    assert n_answers >= 1


def wait_for(is_there, process, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not is_there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What is stored


@pytest.fixture(scope="session")
def direct(model, store):
    """What plain PIL and plain timm give for the first rows: block 5, and after the norm."""
    import torch
    from PIL import Image

    from featstore.datasets import open_dataset

    reader = open_dataset(ROOMS)
    items = {item.path: item for item in reader.items()}
    query = "select distinct row, path from samples where row < 5 order by row"
    lines = ok("featstore", "sql", query, "--store", store, "--json").json["rows"]
    pixels = []
    for line in lines:
        image = Image.fromarray(np.load(io.BytesIO(reader.read_image(items[line["path"]]))))
        pixels.append(np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))
    config = model.pretrained_cfg
    mean, std = np.array(config["mean"]), np.array(config["std"])
    normed = (np.stack(pixels) / 255 - mean) / std
    inputs = torch.from_numpy(normed.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        final, [(patch, prefix)] = model.forward_intermediates(
            inputs, indices=[5], output_fmt="NLC", return_prefix_tokens=True
        )
    block = torch.cat([prefix, patch], dim=1)
    return [line["row"] for line in lines], block.numpy(), final.numpy()


def close_to_direct(direct, read):
    """Compare; float16 keeps 11 bits, and a batch of another size rounds a little differently."""
    rows, block, norm = direct
    for tap, numbers in (("block_5", block), ("norm", norm)):
        scale = np.abs(numbers).max()
        assert numbers.std() > 0.05 * scale, "the test's own numbers say nothing"
        for array, part in (("prefix", numbers[:, :1]), ("patch", numbers[:, 1:])):
            found = np.stack([np.asarray(read(f"{tap}/{array}")[row]) for row in rows])
            np.testing.assert_allclose(found, part, rtol=2**-10, atol=2**-10 * scale)


def feature_set_path(store):
    [path] = (path for path in (store / "feature_sets").iterdir() if path.is_dir())
    return path


def test_plain_zarr_reads_what_timm_gives(store, direct):
    import zarr

    group = zarr.open_group(feature_set_path(store), mode="r")
    close_to_direct(direct, lambda name: group[name])


def test_xarray_reads_what_timm_gives(store, direct):
    import xarray

    path = feature_set_path(store)

    def read(name):
        tap, _, array = name.partition("/")
        with xarray.open_zarr(path / tap, consolidated=False) as found:
            return found[array].load().to_numpy()

    close_to_direct(direct, read)


def test_tensorstore_reads_what_timm_gives(store, direct):
    import tensorstore

    def read(name):
        where = {"driver": "file", "path": str(feature_set_path(store) / name)}
        return tensorstore.open({"driver": "zarr3", "kvstore": where}).result().read().result()

    close_to_direct(direct, read)


def test_our_own_reader_gives_what_timm_gives(store, direct):
    import featstore as library

    features = library.open(store).feature_set()
    n_rows = 1 + max(direct[0])

    def read(name):
        tap, _, array = name.replace("_", ":").partition("/")
        return features.read(tap if array == "patch" else f"{tap}/prefix", rows=range(n_rows))

    close_to_direct(direct, read)
    rows, _, norm = direct
    pooled = features.read("norm.cls", rows=rows)
    np.testing.assert_allclose(pooled, norm[:, 0], rtol=2**-10, atol=2**-10 * np.abs(norm).max())


# Damage


def shard_files(store, array):
    found = sorted(store.glob(f"feature_sets/*/{array}/c/0/**/0")) or sorted(
        store.glob(f"feature_sets/*/{array}/c/0")
    )
    assert found, f"no shard of {array}"
    return [path for path in found if path.is_file()]


def flip_a_bit(store):
    path = shard_files(store, "block_5/patch")[0]
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    return path


def truncate(store):
    path = shard_files(store, "norm/patch")[0]
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def swap(store):
    one, other = shard_files(store, "block_5/patch")[0], shard_files(store, "norm/patch")[0]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return one


def remove(store):
    path = shard_files(store, "norm/prefix")[0]
    path.unlink()
    return path


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, swap, remove])
def test_damage_is_found_named_and_repaired(copy, damage):
    before = content(copy)
    path = damage(copy)
    found = call("featstore", "verify", "--store", copy, "--json")
    assert found.code == 1
    assert not found.json["ok"]
    assert path.relative_to(copy).as_posix() in json.dumps(found.json["problems"])
    ok("featstore", "verify", "--repair", "--store", copy)
    assert content(copy) == before
    report = ok("featstore", "verify", "--store", copy, "--json").json
    assert (report["ok"], report["rows"], report["problems"]) == (True, N_IMAGES, [])


# The index


def test_the_index_may_be_deleted(copy, trained):
    question = ["select * from samples order by row, item, split", "--format", "jsonl"]
    before = ok("featstore", "sql", *question, "--store", copy).out
    (copy / "index.duckdb").unlink()
    ok("featstore", "reindex", "--store", copy)
    assert ok("featstore", "sql", *question, "--store", copy).out == before
    assert len(before.splitlines()) == N_IMAGES


@pytest.mark.parametrize(
    "query",
    [
        "drop table items",
        "delete from items",
        "create table t as select 1",
        "insert into items select * from items",
        "attach '/tmp/other.duckdb'",
        "copy items to 'out.csv'",
        "select * from read_csv('README.md')",
        "select * from 'README.md'",
        "select * from read_text('pyproject.toml')",
        "set enable_external_access = true",
        "install httpfs",
        "pragma database_list; drop table items",
        "select 1; drop table items",
        "selec 1",
        "",
    ],
)
def test_sql_can_only_ask(copy, query):
    done = call("featstore", "sql", query, "--store", copy)
    assert done.code == 1
    assert done.out == ""
    assert one_error_line(done.err)
    assert ok("featstore", "sql", "select count(*) as n from items", "--store", copy).out


def test_sql_cannot_read_a_file_wherever_it_lies(copy, tmp_path):
    # tmp_path lies below the system's temporary folder, where DuckDB might spill.
    (tmp_path / "secret.txt").write_text("secret")
    for query in (
        f"select * from read_text('{tmp_path}/secret.txt')",
        f"from glob('{tmp_path}/*')",
    ):
        assert one_error_line(call("featstore", "sql", query, "--store", copy).err)


def one_error_line(err):
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    return len(lines) == 1 and "Traceback" not in err


# Heads


def test_train_reports_what_it_did(trained):
    for name in ("run_id", "head", "task", "feature_sets", "parameters", "steps", "seconds"):
        assert trained[name], name
    assert trained["steps"] == 20
    assert trained["metrics"]["rmse"] > 0


def test_evaluate_gives_what_training_reported(store, trained):
    found = ok("heads", "evaluate", trained["run_id"], "--store", store, "--json").json
    assert found["metrics"]["rmse"] == pytest.approx(trained["metrics"]["rmse"], rel=1e-5)
    low, high = found["intervals"]["rmse"]
    assert low < found["metrics"]["rmse"] < high


def test_runs_are_listed_and_asked_for_in_sql(store, trained):
    listed = ok("heads", "ls", "--store", store, "--json").json["runs"]
    assert trained["run_id"] in [run["run_id"] for run in listed]
    assert f"test rmse {trained['metrics']['rmse']:.3f}" in ok("heads", "ls", "--store", store).out
    query = """select run_id, head, task, value from metrics join runs using (run_id)
               where name = 'rmse' and split = 'test' order by value"""
    rows = ok("featstore", "sql", query, "--store", store, "--json").json["rows"]
    [row] = [row for row in rows if row["run_id"] == trained["run_id"]]
    assert row["value"] == pytest.approx(trained["metrics"]["rmse"])


def test_a_run_is_removed(copy, trained):
    run_id = trained["run_id"]
    assert ok("heads", "rm", run_id, "--store", copy, "--json").json == {"removed": run_id}
    assert not (copy / "runs" / run_id).exists()
    assert call("heads", "rm", run_id, "--store", copy).code == 1


def test_a_head_predicts_on_new_photos(store, trained, weights, tmp_path):
    from PIL import Image

    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "one.jpg")
    words = ["--images", photos, "--out", out, "--store", store, "--device", "cpu"]
    ok("heads", "predict", trained["run_id"], *words, "--weights", weights)
    [array] = out.rglob("*.npy")
    depth = np.load(array)
    assert depth.shape[-2:] == (90, 120)
    assert np.isfinite(depth).all()
    assert (depth > 0).all()
    assert list(out.rglob("*.png"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_real_photos_with_real_weights_reach_the_depth_error_they_should(shared, tmp_path):
    """A kitchen of one video: a smoke test. The train mean gives 0.756 m."""
    data, weights = shared / "data/depth_nyu_layout", shared / "weights/vits14_saliency.safetensors"
    if not (data.is_dir() and weights.is_file()):
        pytest.skip("the kitchen or the weights are not in ../shared")
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    store = tmp_path / "features.zarr"
    common = ["--data", f"nyu:{data}", "--taps", "block:8", "--image-size", "224", "--store", store]
    errors = {}
    for choice in (str(weights), "random"):
        words = ["--backbone", "vit_small_patch14_dinov2.lvd142m", "--weights", choice]
        key = ok("featstore", "extract", *words, *common, "--json").json["feature_set"]
        words = ["--feature-set", key, "--steps", 600, "--batch-size", 16, "--store", store]
        words += ["--sweep", "seed=0,1,2"]
        runs = ok("heads", "train", "--task", "depth", *words, "--json").json["runs"]
        errors[choice] = [run["metrics"]["rmse"] for run in runs]
    print(errors)
    pretrained, random = errors[str(weights)], errors["random"]
    assert max(pretrained) < 0.40
    assert min(random) > max(pretrained)
    assert np.mean(random) > 1.1 * np.mean(pretrained)


def test_a_sweep_trains_every_combination_and_tells_the_best(copy, tmp_path):
    words = ["--task", "depth", "--steps", 4, "--batch-size", 4, "--device", "cpu", "--store", copy]
    words += ["--runs", tmp_path / "runs", "--sweep", "mask_form=code,paper"]
    words += ["--set", "pictures=0"]
    found = ok("heads", "train", *words, "--sweep", "lr=1e-3,1e-2", "--json").json
    assert [run["swept"] for run in found["runs"]] == [
        {"mask_form": form, "lr": lr} for form in ("code", "paper") for lr in ("1e-3", "1e-2")
    ]
    assert found["passes"] == 1
    lowest = min(found["runs"], key=lambda run: run["best_loss"])
    assert found["best"] == lowest["run_id"]
    done = call("heads", "train", *words, "--sweep", "lr=1e-3,1e30")
    assert done.code == 1
    assert done.out.count("failed") == 2
    assert done.out.count("  best\n") == 1
    assert "mask_form=code, lr=1e30: The loss became" in done.err


# A disk that refuses


def test_a_store_that_cannot_be_written_is_trained_from(store, tmp_path, monkeypatch):
    """The whole tree is read-only; where the tests run as root, which may write all, a stand-in."""
    from featstore.store import StoreFolder

    monkeypatch.setattr(StoreFolder, "is_writable", property(lambda self: False))
    before = content(store)
    words = [
        "--task",
        "depth",
        "--steps",
        2,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--store",
        store,
    ]
    assert "--runs" in refused(call("heads", "train", *words))
    report = ok("heads", "train", *words, "--runs", tmp_path / "runs", "--json").json
    assert (tmp_path / "runs" / report["run_id"] / "head.safetensors").exists()
    listed = ok("heads", "ls", "--runs", tmp_path / "runs", "--store", store, "--json").json["runs"]
    assert [run["run_id"] for run in listed] == [report["run_id"]]
    assert content(store) == before


# Bad input


def refused(done):
    """One clear line, exit 1 (or 2 for wrong usage), no traceback."""
    assert done.code in (1, 2), done
    assert "Traceback" not in done.err
    assert one_error_line(done.err), done.err
    return done.err


def extract_with(words, tmp_path, **changed):
    """`extract` with some options changed: None leaves one out."""
    words = [*words, "--data", ROOMS, "--store", tmp_path / "s.zarr"]
    for name, value in changed.items():
        option = "--" + name.replace("_", "-")
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
        if value is not None:
            words += [option, value]
    return call("featstore", "extract", *words)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backbone": "dinov2_bb", "weights": None}, "dinov2_b"),
        ({"data": "roms:n=3"}, "rooms"),
        ({"data": "rooms"}, "FORMAT"),
        ({"data": "folder:/does/not/exist"}, "/does/not/exist"),
        ({"split": "tets"}, "test"),
        ({"taps": "blok:3"}, "block:"),
        ({"taps": "block:12"}, "block:11"),
        ({"taps": "stage:1"}, "block:"),
        ({"image_size": "65"}, "64"),
        ({"image_size": "0"}, "image-size"),
        ({"resize": "stretch"}, "squash"),
        ({"dtype": "int8"}, "float16"),
        ({"device": "tpu"}, "cpu"),
        ({"weights": "/does/not/exist.safetensors"}, "/does/not/exist.safetensors"),
    ],
)
def test_a_wrong_option_of_extract_is_one_clear_line(words, tmp_path, changed, said):
    assert said in refused(extract_with(words, tmp_path, **changed))
    assert not (tmp_path / "s.zarr").exists()


def test_weights_of_another_architecture_are_refused(words, tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(3, 3)}, path)
    assert "other.safetensors" in refused(extract_with(words, tmp_path, weights=path))


def test_weights_that_are_not_on_this_machine_are_an_error_within_seconds(tmp_path):
    words = ["--backbone", "dinov2_s", "--data", ROOMS, "--store", tmp_path / "s.zarr"]
    began = time.monotonic()
    message = refused(call("featstore", "extract", *words))
    assert "--weights" in message
    assert time.monotonic() - began < 30


def test_activations_that_overflow_name_the_image_and_the_tap(model, words, tmp_path):
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["norm.weight"] *= 1e6
    path = tmp_path / "huge.safetensors"
    save_file(state, path)
    message = refused(extract_with(words, tmp_path, weights=path, on_bad_image="fail"))
    assert "norm" in message
    assert "bfloat16" in message


def test_an_empty_folder_is_refused(words, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in refused(extract_with(words, tmp_path, data=f"folder:{empty}"))


@pytest.mark.parametrize(
    "command",
    [
        ["featstore", "info"],
        ["featstore", "ls"],
        ["featstore", "sql", "select 1"],
        ["featstore", "verify"],
        ["featstore", "reindex"],
        ["featstore", "gc"],
        ["featstore", "rm", "x"],
        ["heads", "train", "--task", "depth"],
        ["heads", "evaluate", "@last"],
        ["heads", "ls"],
        ["heads", "rm", "@last"],
    ],
)
def test_a_folder_that_is_no_store_is_refused(command, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        assert str(folder) in refused(call(*command, "--store", folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_extracting_into_a_folder_that_is_no_store_is_refused(words, tmp_path):
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "notes.txt").write_text("mine")
    assert "s.zarr" in refused(extract_with(words, tmp_path))


def test_a_store_of_a_newer_format_is_refused(copy):
    path = copy / "zarr.json"
    about = json.loads(path.read_text())
    about["attributes"]["featstore"]["format"] = 99
    path.write_text(json.dumps(about))
    assert "99" in refused(call("featstore", "info", "--store", copy))


@pytest.mark.parametrize(
    ("words_of_train", "said"),
    [
        (["--task", "deph"], "depth"),
        (["--task", "depth", "--head", "daep"], "deap"),
        (["--task", "depth", "--tap", "block:3"], "block:5"),
        (["--task", "depth", "--feature-set", "nothing"], "vit_tiny"),
        (["--task", "depth", "--split", "trian"], "train"),
        (["--task", "depth", "--set", "quries=3"], "queries"),
        (["--task", "depth", "--steps", "0"], "steps"),
        (["--resume", "no-such-run"], "no-such-run"),
        (["--resume", "@last", "--sweep", "lr=1,2"], "leave out --sweep"),
        (["--task", "depth", "--sweep", "lr=fast"], "number"),
        (["--task", "depth", "--sweep", "lr="], "lr=1e-3,3e-4"),
        (["--task", "depth", "--sweep", "quries=3,4"], "queries"),
        (["--task", "depth", "--cache", "gpu", "--device", "cpu"], "ram or none"),
    ],
)
def test_a_wrong_option_of_train_is_one_clear_line(store, trained, words_of_train, said):
    assert said in refused(call("heads", "train", *words_of_train, "--store", store))


def test_two_feature_sets_are_told_apart_field_by_field(copy, words):
    other = list(words)
    other[other.index("--image-size") + 1] = "32"
    ok("featstore", "extract", *other, "--data", ROOMS, "--limit", "4", "--store", copy)
    message = refused(call("heads", "train", "--task", "depth", "--store", copy))
    assert "image_size" in message
    assert "--feature-set" in message


# Third-party packages


def test_a_package_adds_a_reader_a_head_and_a_task_through_entry_points(tmp_path):
    (tmp_path / "extra.py").write_text(
        "from featstore.datasets import READERS\n"
        "@READERS.register('extra_reader.v1')\n"
        "def extra_reader(argument, *, name): ...\n"
    )
    (tmp_path / "extra_heads.py").write_text(
        "from heads.base import HEADS\n"
        "from heads.tasks import TASKS\n"
        "HEADS.register('extra_head.v1')(object)\n"
        "TASKS.register('extra_task.v1')(object)\n"
    )
    about = tmp_path / "extra-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[featstore.readers]\nextra = extra\n"
        "[heads.heads]\nextra = extra_heads\n[heads.tasks]\nextra = extra_heads\n"
    )
    code = (
        "from featstore.datasets import READERS\nfrom heads.base import HEADS\n"
        "from heads.tasks import TASKS\n"
        "print('extra_reader.v1' in READERS, 'extra_head.v1' in HEADS, 'extra_task.v1' in TASKS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True"] * 3

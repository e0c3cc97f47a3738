"""`featstore extract` on a cluster and in parts, from the command line, with a real backbone."""

from __future__ import annotations

import importlib
import json

import pytest
from click.testing import CliRunner

import featstore
from cli.common import exit_code
from cli.featstore_app import featstore as app
from featstore.errors import InvalidInputError
from featstore.extraction import ExtractReport, SetAside
from featstore.plan import RunOptions
from tests.fakes import FakeReader, content

DATA = "rooms:n=9,seed=3,size=32"


def run(path, *words):
    base = ["extract", "--store", path, "--backbone", "vit_tiny_patch16_224", "--data", DATA]
    base += ["--weights", "random", "--image-size", "32", "--taps", "block:1,norm.mean"]
    base += ["--device", "cpu", "--batch-size", "2", "--no-latency"]
    done = CliRunner().invoke(app, [*map(str, base), *words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_two_workers_and_parts_write_the_bytes_of_the_serial_path(tmp_path):
    report = run(tmp_path / "serial.zarr")
    assert (report["rows"], report["set_aside"], report["remaining_rows"]) == (9, [], 0)
    expected = content(tmp_path / "serial.zarr")
    # One shard of the default size holds all nine, so the parts are one and none.
    parts = [run(tmp_path / "parts.zarr", "--shard-range", part) for part in ("2/2", "1/2")]
    assert [part["remaining_rows"] for part in parts] == [9, 0]
    assert content(tmp_path / "parts.zarr") == expected
    report = run(tmp_path / "workers.zarr", "--workers", "2")
    assert (report["rows"], report["new_rows"], report["latency"]) == (9, 9, None)
    assert content(tmp_path / "workers.zarr") == expected


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--workers", "0"], 2, "--workers"),
        (["--shard-range", "0/4"], 2, "1/4, 2/4"),
        (["--shard-range", "5/4"], 2, "1/4, 2/4"),
        (["--shard-range", "half"], 2, "1/4, 2/4"),
        (["--workers", "2", "--scheduler", "tcp://host:8786"], 1, "left out with a scheduler"),
        (["--scheduler", "nowhere"], 1, "No Dask scheduler answers at nowhere"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_written(
    tmp_path, capsys, words, code, message
):
    path = tmp_path / "s.zarr"
    base = ["extract", "--store", path, "--backbone", "vit_tiny_patch16_224", "--data", DATA]
    assert exit_code(app, [*map(str, base), *words]) == code
    assert message in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("options", [{"workers": 2}, {"scheduler": "tcp://127.0.0.1:1"}])
def test_an_open_reader_cannot_go_to_workers(tmp_path, options):
    with pytest.raises(InvalidInputError, match=r"'fake' was given as an open reader.*FORMAT:PATH"):
        featstore.extract(
            tmp_path / "s.zarr",
            backbone="vit_tiny_patch16_224",
            data=[FakeReader(3)],
            options=RunOptions(**options),
        )


def test_wrong_options_of_the_library_are_refused():
    for part in ((0, 4), (5, 4)):
        with pytest.raises(InvalidInputError, match="i/n with i from 1 to n"):
            RunOptions(shard_range=part)
    with pytest.raises(InvalidInputError, match="at least 1"):
        RunOptions(workers=0)


def test_a_shard_that_was_set_aside_is_named_with_its_images_and_the_exit_code_is_3(
    tmp_path, monkeypatch, capsys
):
    report = ExtractReport(
        store="s",
        feature_set="k",
        name="n",
        backbone="b",
        taps=("norm",),
        tail=0,
        rows=1,
        new_rows=1,
        reused_rows=0,
        bad=(),
        bytes=1,
        seconds=1.0,
        images_per_second=1.0,
        set_aside=(SetAside(shard=7, images=("d/a.png", "d/b.png"), reason="3 processes died."),),
        remaining_rows=12,
    )
    # As an attribute of the package, this name is the function.
    module = importlib.import_module("featstore.extract")
    monkeypatch.setattr(module, "extract", lambda *_, **__: report)
    words = ["extract", "--store", str(tmp_path / "s"), "--backbone", "b", "--data", DATA]
    assert exit_code(app, words) == 3
    printed = capsys.readouterr()
    assert "Set shard 7 aside: 3 processes died. It holds d/a.png, d/b.png." in printed.err
    assert "12 rows, in the other parts" in printed.out


def test_each_worker_has_a_gpu_of_its_own_or_its_share_of_the_cores(monkeypatch):
    from featstore import local_devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-77")
    assert local_devices.environments(2, "cuda") == [
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "GPU-77"},
    ]
    with pytest.raises(InvalidInputError, match="at most the 2 GPUs here"):
        local_devices.environments(3, "cuda")
    with pytest.raises(InvalidInputError, match="CUDA_VISIBLE_DEVICES"):
        local_devices.environments(1, "cuda:1")
    assert local_devices.environments(3, "cpu") == [{}, {}, {}]


@pytest.mark.parametrize(("cores", "asked", "threads"), [(8, "", 4), (8, "2", 2), (1, "4", 1)])
def test_two_workers_share_the_threads(monkeypatch, cores, asked, threads):
    from featstore import local_devices

    monkeypatch.setattr(local_devices, "n_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert local_devices.share_of_threads(2) == threads

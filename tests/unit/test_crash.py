"""Promise 1 and 6: killed or out of disk at any moment, a rerun ends with the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import subprocess
import time

import pytest

from featstore.errors import StorageError
from featstore.plan import RunOptions
from featstore.store import create_folder, open_folder
from featstore.version import __version__
from tests.fakes import SHAPES, FakeReader, content, fake_extract, fake_plan

N_IMAGES = 60
DELAY_S = 0.01  # a batch; stretches the run so that kills land everywhere in it
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.fakes"])


def _extract(path, views=()):
    options = RunOptions(views=views, n_threads=2)
    fake_extract(path, [FakeReader(N_IMAGES, bad=[7])], delay_s=DELAY_S, options=options)


def _start(path, views=()):
    process = CONTEXT.Process(target=_extract, args=(path, views))
    process.start()
    return process


def _committed(path):
    if not (path / "zarr.json").exists():
        return {}
    folder = path / "feature_sets" / fake_plan().key()
    return {file: file.read_bytes() for file in folder.glob("ledger/*/*.parquet")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
    _extract(path)
    return content(path)


def _kill(process, path, moments, n_files, n_before=0):
    """Kill at a random moment, told by what lies on the disk: a clock is no measure when busy."""
    n_wanted = n_before + moments.randrange(n_files)
    while process.is_alive() and sum(file.is_file() for file in path.rglob("*")) < n_wanted:
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 2 * DELAY_S))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("n_moments", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_store_ends_the_same(tmp_path, undisturbed, n_moments):
    expected = undisturbed
    moments = random.Random(0)
    n_kills = 0
    for attempt in range(n_moments):
        path = tmp_path / f"{attempt}.zarr"
        process = _start(path)
        n_kills += _kill(process, path, moments, len(expected))
        committed = _committed(path)
        report = fake_extract(path, [FakeReader(N_IMAGES, bad=[7])])
        for file, data in committed.items():
            assert file.read_bytes() == data, "a committed ledger changed"
        whole = [shard for shard in range(8) if _shard_done(path, committed, shard)]
        assert report.reused_rows >= 8 * len(whole) - 8  # the last shard may be partial
        assert content(path) == expected
    assert n_kills >= n_moments // 2, "the kills came too late to prove anything"


def _shard_done(path, committed, shard):
    names = [f"{file.parent.name}/{file.stem}" for file in committed]
    return all(f"{s.tap.replace(':', '_')}/{shard:05d}" in names for s in SHAPES)


def test_killed_again_and_again_the_same_store_still_ends_the_same(tmp_path, undisturbed):
    expected = undisturbed
    path = tmp_path / "s.zarr"
    moments = random.Random(1)
    for _ in range(8):
        process = _start(path)
        _kill(process, path, moments, len(expected))
    fake_extract(path, [FakeReader(N_IMAGES, bad=[7])])
    assert content(path) == expected


def test_killed_while_views_are_added_the_store_ends_the_same(tmp_path, undisturbed):
    views = ("hflip", "crops:1")
    plain, whole = tmp_path / "plain.zarr", tmp_path / "whole.zarr"
    _extract(plain)
    shutil.copytree(plain, whole)
    _extract(whole, views)
    expected = content(whole)
    assert expected.keys() > undisturbed.keys()
    moments = random.Random(2)
    n_kills = 0
    for attempt in range(5):
        path = tmp_path / f"{attempt}.zarr"
        shutil.copytree(plain, path)
        n_plain = sum(file.is_file() for file in path.rglob("*"))
        process = _start(path, views)
        n_kills += _kill(process, path, moments, len(expected) - n_plain, n_plain)
        committed = _committed(path)
        _extract(path, views)
        for file, data in committed.items():
            assert file.read_bytes() == data, "a committed ledger changed"
        assert content(path) == expected
    assert n_kills >= 3, "the kills came too late to prove anything"


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of 1 MB, where this process may."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", str(path)], check=False)


def test_a_full_disk_is_one_clear_error_and_nothing_committed_is_lost(small_disk, tmp_path):
    undisturbed_path = tmp_path / "whole.zarr"
    big = {"source_hw": (64, 96)}
    fake_extract(undisturbed_path, [FakeReader(N_IMAGES, **big)])
    path = small_disk / "s.zarr"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    with pytest.raises(StorageError, match="No space left"):
        fake_extract(path, [FakeReader(N_IMAGES, **big)])
    committed = _committed(path)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    fake_extract(path, [FakeReader(N_IMAGES, **big)])
    for file, data in committed.items():
        assert file.read_bytes() == data
    assert content(path) == content(undisturbed_path)


def test_readers_during_a_write_see_only_committed_shards(tmp_path):
    path = tmp_path / "s.zarr"
    process = _start(path)
    seen = set()
    while process.is_alive():
        for file in _committed(path):
            shard = int(file.stem)
            tap = file.parent.name
            seen.add((tap, shard))
            folder = open_folder(path).feature_set(fake_plan().key())
            for shape in SHAPES:
                if shape.tap.replace(":", "_") == tap:
                    for array in shape.arrays:
                        assert folder.shard_file(shape.tap, array, shard).exists()
    process.join()
    assert process.exitcode == 0
    assert len(seen) > 3


@pytest.mark.parametrize("n_files", [0, 1])
def test_a_store_killed_while_it_was_made_is_completed(tmp_path, undisturbed, n_files):
    path = tmp_path / "s.zarr"
    path.mkdir()
    (path / "zarr.json.1.partial").write_text("{")
    if n_files:
        create_folder(path, library=__version__)
        shutil.rmtree(path / "feature_sets")
    _extract(path)
    assert content(path) == undisturbed

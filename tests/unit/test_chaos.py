"""Everything at once: workers and drivers that die, extractions and trainings on one store."""

from __future__ import annotations

import collections
import contextlib
import json
import multiprocessing
import random
import time

import psutil
import pyarrow as pa
import pytest

from featstore.dask_runner import Cluster, DaskCrew
from featstore.ledger import read_ledger
from featstore.plan import RunOptions
from featstore.store import open_folder
from featstore.verify import verify
from tests.fakes import FakeReader, FakeSpec, content, fake_extract, fake_plan

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.fakes"])
POISON = "00033.npy"


def stored_rows(path):
    """Count for each stored image how many rows hold it."""
    folder = open_folder(path).feature_set(fake_plan().key())
    tables = [read_ledger(folder, "norm", shard) for shard in folder.committed_shards("norm")]
    lines = pa.concat_tables(tables).to_pylist()
    return collections.Counter(line["image_key"] for line in lines if line["status"] == "ok")


def drive(path, report_path, n_images, delay_s):
    readers = (FakeReader(n_images, bad=[7]),)
    spec = FakeSpec(readers=readers, delay_s=delay_s, poison=POISON)
    with Cluster(RunOptions(workers=3, device="cpu"), tell=print) as cluster:
        report = fake_extract(path, readers, crew=DaskCrew(cluster, spec))
    report_path.write_text(json.dumps(report.to_json()))


def workers_of(driver):
    """Give the worker processes that have begun to work."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(child.cmdline()) and child.cpu_times().user > 1:
                    found.append(child)
    return found


def wait_for(is_so, *, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_and_drivers_die_and_every_good_image_is_there_once(tmp_path):
    n_images, path, report_path = 800, tmp_path / "s.zarr", tmp_path / "report.json"
    chance = random.Random(0)
    n_deaths = 0
    for n_drivers in range(3):
        driver = CONTEXT.Process(target=drive, args=(path, report_path, n_images, 0.2))
        driver.start()
        while driver.is_alive():
            driver.join(chance.uniform(2, 5))
            workers = workers_of(driver)
            if driver.is_alive() and len(workers) > 1:
                victim = chance.choice(workers)
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
                    n_deaths += 1
            n_done = len(list(path.glob("feature_sets/*/ledger/norm/*.parquet")))
            if n_drivers < 2 and n_done > 20 * (n_drivers + 1):
                orphans = workers_of(driver)
                driver.kill()
                driver.join()
                wait_for(lambda left=orphans: not any(one.is_running() for one in left))
        driver.join()
    assert driver.exitcode == 0
    assert n_deaths >= 10, "too few deaths to prove anything"
    report = json.loads(report_path.read_text())
    named = {image for shard in report["set_aside"] for image in shard["images"]}
    assert f"fake/{POISON}" in named
    assert len(report["set_aside"]) == 1
    found = verify(path)
    assert found.problems == []
    assert set(stored_rows(path).values()) == {1}
    assert n_images - 1 - 8 <= len(stored_rows(path)) <= n_images - 8
    # What was set aside is all that lacks, and a process that does not die of it stores it.
    fake_extract(path, [FakeReader(n_images, bad=[7])])
    fake_extract(tmp_path / "alone.zarr", [FakeReader(n_images, bad=[7])])
    assert content(path) == content(tmp_path / "alone.zarr")


def keep_extracting(path, seconds, seed):
    """Add images to one feature set again and again, some of them those of the others."""
    deadline = time.monotonic() + seconds
    n_images = 20
    while time.monotonic() < deadline:
        n_images += 4 + seed
        options = RunOptions(n_threads=1, seed=seed)
        report = fake_extract(path, [FakeReader(n_images)], delay_s=0.005, options=options)
        assert report.rows == n_images
        assert report.bad == ()


def keep_training(path, seconds, seed):
    import heads

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        options = {"queries": 4, "checks": 1, "pictures": 0}
        report = heads.train(
            path, task="depth", steps=3, batch_size=4, device="cpu", seed=seed, options=options
        )
        assert report.steps == 3


def let_loose(path, seconds):
    """Import what takes seconds once, then go on as eight processes."""
    import heads.train  # noqa: F401

    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=target, args=(path, seconds, seed))
        for seed in range(4)
        for target in (keep_extracting, keep_training)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * len(codes)


def crowd(path, seconds):
    """Let four extractions and four trainings loose on one store."""
    fake_extract(path, [FakeReader(20)])
    process = CONTEXT.Process(target=let_loose, args=(path, seconds))
    process.start()
    process.join()
    assert process.exitcode == 0
    found = verify(path)
    assert (found.problems, found.waste) == ([], [])
    rows = stored_rows(path)
    assert set(rows.values()) == {1}, "an image is stored twice"
    folder = open_folder(path).feature_set(fake_plan().key())
    assert folder.assignments().num_rows == len(rows), "a row was assigned and never stored"


def test_four_extractions_and_four_trainings_for_seconds(tmp_path):
    crowd(tmp_path / "s.zarr", 8)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_extractions_and_four_trainings_for_two_minutes(tmp_path):
    crowd(tmp_path / "s.zarr", 120)

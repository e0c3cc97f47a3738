"""Shards on a Dask cluster: the serial path's bytes, and deaths of workers that cost a retry."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from featstore import dask_runner
from featstore.dask_runner import Cluster, DaskCrew
from featstore.errors import InvalidInputError, NotFoundError
from featstore.plan import RunOptions
from featstore.store import locate
from featstore.verify import verify
from tests.fakes import FakeReader, FakeSpec, content, fake_extract

N_IMAGES = 60
READERS = (FakeReader(N_IMAGES, bad=[7]),)
SHARD_ROWS = 8  # of `fake_extract`


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    fake_extract(path, READERS)
    return content(path)


@pytest.fixture(scope="module")
def cluster():
    with Cluster(RunOptions(workers=2, device="cpu"), tell=print) as cluster:
        yield cluster


class Without(FakeReader):
    """The same images but one."""

    def items(self):
        return [item for item in super().items() if item.path != "00033.npy"]


def pids(cluster):
    return sorted(cluster.client.run(os.getpid).values())


def extract(path, cluster, **spec):
    options = {name: spec.pop(name) for name in ("progress", "options") if name in spec}
    crew = DaskCrew(cluster, FakeSpec(readers=READERS, **spec))
    return fake_extract(path, READERS, crew=crew, **options)


def test_two_workers_write_the_bytes_of_one_process(tmp_path, cluster, alone):
    path = tmp_path / "s.zarr"
    seen = []
    report = extract(path, cluster, delay_s=0.2, progress=seen.append)
    assert (report.rows, report.new_rows, len(report.bad)) == (N_IMAGES - 1, N_IMAGES - 1, 1)
    assert content(path) == alone
    done = [one.done for one in seen if one.stage == "extract" and one.total]
    assert done[-1] == N_IMAGES
    assert any(count % SHARD_ROWS for count in done[:-1]), "counted while shards are under way"
    again = extract(path, cluster)
    assert (again.new_rows, again.reused_rows) == (0, N_IMAGES - 1)


def test_a_worker_that_is_killed_costs_a_retry(tmp_path, cluster, alone):
    path = tmp_path / "s.zarr"
    killed = []

    def progress(report):
        if report.stage == "extract" and report.done >= 8 and len(killed) < 1:
            killed.append(pids(cluster)[0])
            os.kill(killed[0], signal.SIGKILL)

    report = extract(path, cluster, delay_s=0.05, progress=progress)
    assert killed
    assert (report.rows, report.set_aside) == (N_IMAGES - 1, ())
    assert content(path) == alone
    assert killed[0] not in pids(cluster)


def test_a_shard_that_ends_its_workers_is_set_aside_by_name(tmp_path, cluster, alone):
    path = tmp_path / "s.zarr"
    report = extract(path, cluster, poison="00033.npy")
    [found] = report.set_aside
    assert "fake/00033.npy" in found.images
    assert found.reason.startswith(
        "3 processes died while they did it. They died of fake/00033.npy"
    )
    assert len(found.images) == 8
    assert not list(path.glob(".locks/*.claims/*.notes"))
    assert report.rows in (N_IMAGES - 8, N_IMAGES - 9)  # the bad image may be among the eight
    assert verify(path).problems == []
    shutil.copytree(path, tmp_path / "without.zarr")
    again = extract(path, cluster)
    assert again.new_rows == N_IMAGES - 1 - report.rows
    assert content(path) == alone
    # As the message says: with that image gone, the rest of the shard is stored.
    rest = fake_extract(tmp_path / "without.zarr", (Without(N_IMAGES, bad=[7]),))
    assert (rest.rows, rest.set_aside) == (N_IMAGES - 2, ())
    assert verify(tmp_path / "without.zarr").problems == []


def test_workers_of_other_machines_write_a_store_behind_a_url(tmp_path, alone, monkeypatch):
    pytest.importorskip("obstore", reason="obstore, which talks to object stores, is not installed")
    plainly = dask_runner.environments

    def elsewhere(n_workers, device):
        """Have each worker mirror the store on a disk of its own."""
        return [
            {**environment, "FEATSTORE_CACHE": str(tmp_path / f"machine{number}")}
            for number, environment in enumerate(plainly(n_workers, device))
        ]

    monkeypatch.setattr(dask_runner, "environments", elsewhere)
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "driver"))
    url = f"file://{tmp_path}/far/features.zarr"
    with Cluster(RunOptions(workers=2, device="cpu"), tell=print) as cluster:
        report = extract(locate(url), cluster, delay_s=0.05)
        assert (report.rows, report.new_rows) == (N_IMAGES - 1, N_IMAGES - 1)
        again = extract(locate(url), cluster)
        assert (again.new_rows, again.reused_rows) == (0, N_IMAGES - 1)
    assert content(tmp_path / "far/features.zarr") == alone
    assert verify(url).problems == []
    assert len(list(tmp_path.glob("machine*/mirrors/*/feature_sets"))) == 2


def test_the_shards_of_another_extraction_are_waited_for(tmp_path, cluster, alone):
    path = tmp_path / "s.zarr"
    serial = []

    def progress(report):
        if report.stage == "extract" and report.done and not serial:
            serial.append(fake_extract(path, READERS, delay_s=0.02))

    report = extract(path, cluster, delay_s=0.02, progress=progress)
    assert report.rows == serial[0].rows == N_IMAGES - 1
    assert report.new_rows + serial[0].new_rows == N_IMAGES - 1
    assert content(path) == alone


def test_what_is_wrong_on_a_worker_ends_the_extraction_in_its_words(tmp_path, cluster):
    with pytest.raises(NotFoundError, match=r"^On .*: No weights here\.$"):
        extract(tmp_path / "s.zarr", cluster, misses="No weights here.")


def test_workers_that_die_before_they_begin_end_the_extraction(tmp_path, cluster, monkeypatch):
    distributed = dask_runner._distributed()

    class Dead:
        status = "error"

        def add_done_callback(self, tell):
            tell(self)

        def exception(self):
            return distributed.KilledWorker("task", None, 3)

    monkeypatch.setattr(cluster.client, "submit", lambda *_, **__: Dead())
    with pytest.raises(InvalidInputError, match="die before they begin a shard"):
        extract(tmp_path / "s.zarr", cluster)


def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(dask_runner, "_CONNECT_S", 0.2)
    options = RunOptions(scheduler="tcp://127.0.0.1:1")
    with pytest.raises(NotFoundError, match=r"answers at tcp://127\.0\.0\.1:1\..*dask scheduler"):
        Cluster(options, tell=print).__enter__()


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'featstore-heads\[cluster\]'"):
        Cluster(RunOptions(workers=2), tell=print)


def test_the_workers_of_a_scheduler_that_runs_already_are_used_and_left(tmp_path, cluster, alone):
    path = tmp_path / "s.zarr"
    before = pids(cluster)
    options = RunOptions(scheduler=cluster.client.scheduler.address, device="cpu")
    with Cluster(options, tell=print) as other:
        assert other.device == "cpu"
        extract(path, other)
    assert content(path) == alone
    assert pids(cluster) == before

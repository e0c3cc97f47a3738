"""Promise 4: several writers of one feature set share its shards, and nobody sees a lock."""

from __future__ import annotations

import json
import multiprocessing
import random
import time

import pytest

from featstore import index
from featstore.plan import RunOptions
from featstore.verify import verify
from tests.fakes import FakeReader, content, fake_extract

N_IMAGES = 60
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.fakes"])
READERS = [FakeReader(N_IMAGES, bad=[7])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    fake_extract(path, READERS)
    return content(path)


def _extract(path, report_path, delay_s, options):
    report = fake_extract(path, READERS, delay_s=delay_s, options=RunOptions(**options))
    index.refresh(path)
    report_path.write_text(json.dumps(report.to_json()))


def start(path, n, *, delay_s=0.01, **options):
    options = {"n_threads": 1, **options}
    report_paths = [path.with_name(f"{path.name}.{i}.json") for i in range(n)]
    processes = [
        CONTEXT.Process(target=_extract, args=(path, report, delay_s, options))
        for report in report_paths
    ]
    for process in processes:
        process.start()
    return processes, report_paths


def finish(processes, report_paths):
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return [json.loads(path.read_text()) for path in report_paths]


@pytest.mark.parametrize("n", [2, 4])
def test_several_extractions_share_the_work_and_the_store_is_that_of_one(tmp_path, alone, n):
    path = tmp_path / "s.zarr"
    reports = finish(*start(path, n, delay_s=0.05))  # long enough for the last to come in time
    assert [report["rows"] for report in reports] == [N_IMAGES - 1] * n
    assert sum(report["new_rows"] for report in reports) == N_IMAGES - 1, "a shard written twice"
    assert sum(report["new_rows"] > 0 for report in reports) >= 2, "one did it all"
    assert content(path) == alone
    assert verify(path).problems == []
    assert verify(path).waste == []
    assert list((path / ".locks").glob("*.claims/*.json")) == []


def test_one_of_two_is_killed_and_the_other_takes_its_shard_over(tmp_path, alone):
    path = tmp_path / "s.zarr"
    (first, second), (_, report_path) = start(path, 2, delay_s=0.03)
    while first.is_alive() and not list(path.glob("feature_sets/*/*/*/c/*/*/*.partial")):
        time.sleep(0.002)
    first.kill()
    first.join()
    [report] = finish([second], [report_path])
    assert report["rows"] == N_IMAGES - 1
    assert content(path) == alone, "what the dead one left is swept, or was never there"


def test_two_with_other_taps_work_at_the_same_shards(tmp_path, alone):
    from tests.fakes import SHAPES

    path = tmp_path / "s.zarr"
    # One begins where the other stands, in one process: the turns are then the same each time.
    inner = []

    def progress(report):
        if report.stage == "extract" and report.done == 6 and not inner:
            options = RunOptions(n_threads=2, shard_range=(3, 8))  # a shard that is not in hand
            inner.append(fake_extract(path, READERS, shapes=SHAPES[:1], options=options))

    report = fake_extract(path, READERS, progress=progress)
    assert inner[0].new_rows > 0
    assert report.rows == N_IMAGES - 1
    assert content(path) == alone


@pytest.mark.parametrize("n_parts", [1, 3, 11])
def test_the_parts_of_a_shard_range_are_the_whole_in_any_order(tmp_path, alone, n_parts):
    path = tmp_path / "s.zarr"
    parts = list(range(1, n_parts + 1))
    random.Random(n_parts).shuffle(parts)
    done = 0
    for part in parts:
        options = RunOptions(n_threads=1, shard_range=(part, n_parts))
        report = fake_extract(path, READERS, options=options)
        done += report.new_rows
        assert report.rows == done
        assert report.rows + report.remaining_rows in (N_IMAGES - 1, N_IMAGES)
    assert report.remaining_rows == 0
    assert content(path) == alone


def test_a_part_does_not_wait_for_the_others_and_says_what_remains(tmp_path):
    options = RunOptions(n_threads=1, shard_range=(2, 4))  # shards 1 and 5 of 8
    report = fake_extract(tmp_path / "s.zarr", [FakeReader(64)], options=options)
    assert (report.rows, report.remaining_rows) == (16, 48)
    report = fake_extract(tmp_path / "s.zarr", [FakeReader(64)], options=options)
    assert (report.rows, report.new_rows, report.remaining_rows) == (16, 0, 48)


def test_parts_are_fixed_by_the_number_of_the_shard_alone():
    for n_parts in range(1, 9):
        parts = [RunOptions(shard_range=(i, n_parts)) for i in range(1, n_parts + 1)]
        for shard in range(40):
            assert sum(options.has_shard(shard) for options in parts) == 1
    assert RunOptions().has_shard(17)

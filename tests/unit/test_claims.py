"""Claims: one holder a shard, taken over from the dead, and never committed by who lost one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from featstore import claims, processes
from featstore.claims import Claims, claims_folder, claims_lock, live_claims, sweep_partials
from featstore.cleanup import gc, remove_feature_set
from featstore.errors import ConflictError
from featstore.files import PARTIAL
from featstore.processes import is_gone, this_process
from featstore.repair import repair_shards
from featstore.shared_shards import ShardTask, claim_task
from featstore.store import open_folder
from featstore.verify import verify
from tests.fakes import FakeReader, content, fake_extract, fake_plan

KEY = fake_plan().key()


@pytest.fixture
def store(tmp_path):
    fake_extract(tmp_path / "s.zarr", [FakeReader(20)])
    return open_folder(tmp_path / "s.zarr")


def writer(store, **options):
    return Claims(store, KEY, purpose="testing", **options)


def claim_file(store, shard):
    return claims_folder(store, KEY) / f"{shard:05d}.json"


def age(store, shard, seconds):
    """Make a claim look as if its last heartbeat were so long ago."""
    path = claim_file(store, shard)
    then = time.time() - seconds
    os.utime(path, (then, then))


def edit(store, shard, **changes):
    """Make a claim another process's."""
    path = claim_file(store, shard)
    value = json.loads(path.read_text())
    value["process"].update(changes)
    before = path.stat()
    path.write_text(json.dumps(value))
    os.utime(path, (before.st_atime, before.st_mtime))


def test_a_shard_has_one_holder_until_it_is_released(store):
    with writer(store) as one, writer(store) as other:
        claim = one.take(3)
        assert claim is not None
        assert other.take(3) is None
        assert other.take(4) is not None
        claim.release()
        assert other.take(3) is not None
    assert list(claims_folder(store, KEY).glob("*.json")) == []


def test_a_claim_without_a_heartbeat_for_a_minute_is_dead(store):
    with writer(store) as one, writer(store) as other:
        one.take(0)
        edit(store, 0, machine="another")  # whose processes nobody here can see
        age(store, 0, claims.EXPIRY_S - 5)
        assert other.take(0) is None
        age(store, 0, claims.EXPIRY_S + 5)
        assert other.take(0) is not None


def test_the_age_is_taken_by_the_clock_of_the_file_system(store, monkeypatch):
    with writer(store) as one, writer(store) as other:
        one.take(0)
        monkeypatch.setattr(time, "time", lambda: 1e10)  # this machine's clock is wrong
        assert other.take(0) is None


def test_the_claim_of_a_process_that_is_gone_is_dead_at_once(store):
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with writer(store) as one, writer(store) as other:
        one.take(0)
        edit(store, 0, pid=sleeper.pid, started=processes._started(sleeper.pid))
        assert other.take(0) is None
        sleeper.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
        assert other.take(0) is not None, "a zombie does nothing any more"
        sleeper.communicate()


def test_a_process_of_the_same_number_is_another_one():
    own = this_process()
    assert not is_gone(own)
    assert is_gone(dataclasses.replace(own, started="1"))
    assert is_gone(dataclasses.replace(own, pid=2**22 + 1))
    assert not is_gone(dataclasses.replace(own, started="1", machine="another"))


def test_a_heartbeat_keeps_a_claim_alive(store, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    with writer(store) as one:
        one.take(0)
        age(store, 0, 1000)
        deadline = time.monotonic() + 10
        while time.time() - claim_file(store, 0).stat().st_mtime > 500:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_heartbeat_does_not_help_who_took_the_shard_over(store, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    with writer(store) as one:
        one.take(0)
        value = json.loads(claim_file(store, 0).read_text())
        claim_file(store, 0).write_text(json.dumps({**value, "nonce": "other"}))
        age(store, 0, 1000)
        time.sleep(0.1)
        assert time.time() - claim_file(store, 0).stat().st_mtime > 500


def test_who_lost_a_claim_is_told_before_it_commits(store):
    with writer(store) as one, writer(store) as other:
        first = one.take(0)
        age(store, 0, 1000)
        edit(store, 0, machine="another")
        second = other.take(0)
        with first.committing() as is_own:
            assert not is_own
        assert claim_file(store, 0).exists(), "the other's claim is not given up"
        with second.committing() as is_own:
            assert is_own
        assert not claim_file(store, 0).exists()


def test_deaths_are_counted_within_a_job(store):
    def die(job):
        with writer(store, job=job) as one:
            claim = one.take(0)
            edit(store, 0, pid=2**22 + 1)
            one._held.clear()  # dead processes give nothing up
        return claim.deaths

    assert [die("a"), die("a"), die("a")] == [0, 1, 2]
    assert die("b") == 0
    with writer(store, job="b") as one:
        claim = one.take(0)
        assert claim.deaths == 1
        claim.release()
        assert one.take(0).deaths == 0, "a release ends the count"


def test_a_torn_claim_is_none(store):
    with writer(store) as one:
        one.take(0)
        claim_file(store, 0).write_text('{"nonce": ')
        with writer(store) as other:
            assert other.take(0) is not None


def test_partials_of_the_living_are_kept_and_those_of_the_dead_are_swept(store):
    folder = store.feature_set(KEY)
    with writer(store) as one, writer(store) as other:
        mine, theirs = one.take(7), other.take(8)
        assert mine.nonce != theirs.nonce
        c = folder.array_path("norm", "patch") / "c"
        paths = [c / "7" / f"0.{nonce}{PARTIAL}" for nonce in (mine.nonce, "0123", "77")]
        c.joinpath("7").mkdir()
        for path in paths:
            path.write_bytes(b"x")
        assert sweep_partials(store, folder) == 2
        assert [path.exists() for path in paths] == [True, False, False]
        assert gc(store.path).busy == [KEY]
        assert paths[0].exists()
        mine.release()
        theirs.release()
    assert sweep_partials(store, folder) == 1


def test_who_takes_a_shard_over_sweeps_what_the_dead_left_of_it(store):
    folder = store.feature_set(KEY)
    unlink_shard(store, 1)
    c, ledgers = folder.array_path("norm", "patch") / "c", folder.ledger_path("norm", 0).parent
    left = [c / "1" / "0" / f"0.0123{PARTIAL}", ledgers / f"00001.parquet.99{PARTIAL}"]
    others = [c / "0" / "0" / f"0.0123{PARTIAL}", ledgers / f"00000.parquet.99{PARTIAL}"]
    for path in left + others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    lines = [line for line in folder.assignments().to_pylist() if 8 <= line["row"] < 16]
    task = ShardTask(shard=1, lines=lines, taps=("norm",))
    with writer(store) as one:
        claim_task(folder, task, one).claim.release()
        assert all(path.exists() for path in left), "nobody died"
        one.take(1)
        edit(store, 1, pid=2**22 + 1)
        assert claim_task(folder, task, one).claim.is_taken_over
    assert [path.exists() for path in left + others] == [False, False, True, True]


def test_gc_leaves_a_shard_that_somebody_is_about_to_commit(store):
    folder = store.feature_set(KEY)
    for tap in folder.taps:
        folder.ledger_path(tap, 1).unlink()
    with writer(store) as one:
        one.take(1)
        report = gc(store.path)
        assert (report.removed, report.busy) == ([], [KEY])
    assert len(gc(store.path).removed) == 5
    assert gc(store.path).busy == []


def test_a_feature_set_that_is_being_written_is_not_removed(store):
    with writer(store) as one:
        one.take(1)
        with pytest.raises(ConflictError, match=r"testing\) works at shard 1 .*stop it"):
            remove_feature_set(store.path, KEY)
    remove_feature_set(store.path, KEY)
    assert not claims_folder(store, KEY).exists()


def test_nobody_commits_into_a_feature_set_that_was_removed(store):
    with writer(store) as one:
        claim = one.take(1)
        with claims_lock(store, KEY, purpose="testing"):
            (store.path / "feature_sets" / KEY).rename(store.path / "elsewhere")
        with claim.committing() as is_own:
            assert not is_own
        with pytest.raises(ConflictError, match="was removed"):
            one.take(2)


def test_an_extraction_passes_over_what_is_held_and_waits_for_it_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("featstore.shared_shards._LAST_POLL_S", 0.05)
    whole, path = tmp_path / "whole.zarr", tmp_path / "s.zarr"
    fake_extract(whole, [FakeReader(40)])
    fake_extract(path, [FakeReader(40)])
    store = open_folder(path)
    for shard in (0, 2, 4):
        unlink_shard(store, shard)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(writer(store))
        other.take(2)
        told = []

        def progress(report):
            if report.message:
                told.append(report.message)
                assert live_claims_now(store).keys() == {2}, "it waits with nothing in hand"
                assert committed(store) == {0, 1, 3, 4}
                stack.close()

        report = fake_extract(path, [FakeReader(40)], progress=progress)
    assert len(told) == 1
    assert "Waiting for 1 shards: Process" in told[0]
    assert (report.rows, report.new_rows) == (40, 24)
    assert content(path) == content(whole)


def unlink_shard(store, shard):
    folder = store.feature_set(KEY)
    for tap, shape in folder.taps.items():
        folder.ledger_path(tap, shard).unlink()
        for array in shape.arrays:
            folder.shard_file(tap, array, shard).unlink()


def committed(store):
    folder = store.feature_set(KEY)
    return set.intersection(*(set(folder.committed_shards(tap)) for tap in folder.taps))


def live_claims_now(store):
    with claims_lock(store, KEY, purpose="looking"):
        return live_claims(store, KEY)


def test_what_another_process_stored_meanwhile_counts_as_reused(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    readers = [FakeReader(40, bad=[3])]
    nested = []

    def progress(report):
        if report.stage == "extract" and report.done == 3 and not nested:
            # Shards 0 and, as the batches are loaded ahead, perhaps 1 are in hand.
            nested.append(fake_extract(path, readers))

    # The inner run would wait for the outer one's shards, so it takes them over.
    monkeypatch.setattr(claims, "EXPIRY_S", -1.0)
    report = fake_extract(path, readers, progress=progress)
    assert nested[0].new_rows == 39
    assert (report.rows, report.new_rows, report.reused_rows) == (39, 0, 39)
    assert verify(path).problems == []


def test_a_shard_that_was_lost_is_thrown_away_and_read_from_its_new_holder(tmp_path):
    path, whole = tmp_path / "s.zarr", tmp_path / "whole.zarr"
    fake_extract(whole, [FakeReader(32)])
    stolen = []

    def progress(report):
        if report.stage == "extract" and report.done >= 6 and not stolen:
            store = open_folder(path)
            held = list(live_claims_now(store))
            assert 0 in held
            for shard in held:
                age(store, shard, 1000)
                edit(store, shard, machine="another")
            stolen.append(fake_extract(path, [FakeReader(32)]))

    report = fake_extract(path, [FakeReader(32)], progress=progress)
    assert stolen
    assert report.rows == 32
    assert (report.new_rows, stolen[0].new_rows) == (0, 32), "no shard was written twice"
    assert content(path) == content(whole)


def test_a_repair_waits_for_who_works_at_the_shard_and_then_names_it(store, monkeypatch):
    monkeypatch.setattr("featstore.repair._WAIT_S", 0.05)
    monkeypatch.setattr("featstore.repair._source", lambda *_: None)
    readers = {"fake": FakeReader(20)}
    monkeypatch.setattr("featstore.sources.Readers._open", lambda self, dataset: readers[dataset])
    before = content(store.path)
    with writer(store) as one:
        one.take(1)
        with pytest.raises(ConflictError, match=r"testing\) works at shard 1"):
            repair_shards(store.path, {KEY: {1: {"norm"}}})
    assert content(store.path) == before, "nothing was thrown away"


@pytest.mark.skipif(shutil.which("ps") is None, reason="ps, which other systems have, is missing")
def test_without_proc_the_system_is_asked_in_one_language_and_time_zone(monkeypatch):
    plainly = processes._asked(os.getpid())
    assert plainly
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert processes._asked(os.getpid()) == plainly
    child = subprocess.Popen(["true"])
    child.wait()
    assert not processes._asked(child.pid)

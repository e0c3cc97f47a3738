"""Which image processes died of: notes that the dead leave, and when they say something."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from featstore.claims import Claims, notes_of
from featstore.shard_job import ShardJob
from featstore.shared_shards import ShardTask, claim_task
from featstore.sources import Readers
from featstore.store import StoreFolder, open_folder
from featstore.suspects import look_through, suspect_of
from tests.fakes import FakeReader, FakeSource, fake_extract, fake_plan

SHARD = 1


class Deadly(FakeSource):
    """Ends its process at one row."""

    def __init__(self, readers, row):
        super().__init__(readers)
        self._row = row

    def load(self, line):
        if line["row"] == self._row:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(line)


@pytest.fixture
def path(tmp_path):
    """A store whose second shard lacks its ledger."""
    fake_extract(tmp_path / "s.zarr", [FakeReader(16, bad=[9])])
    folder = open_folder(tmp_path / "s.zarr").feature_set(fake_plan().key())
    for tap in folder.taps:
        folder.ledger_path(tap, SHARD).unlink()
    return tmp_path / "s.zarr"


def held(path, claims) -> ShardJob:
    folder = open_folder(path).feature_set(fake_plan().key())
    lines = [line for line in folder.assignments().to_pylist() if line["row"] // 8 == SHARD]
    found = claim_task(folder, ShardTask(shard=SHARD, lines=lines, taps=tuple(folder.taps)), claims)
    assert isinstance(found, ShardJob)
    return found


def look(path, row):
    with Claims(open_folder(path), fake_plan().key(), purpose="looking", job="j") as claims:
        source = Deadly(Readers(open_folder(path), [FakeReader(16, bad=[9])]), row)
        look_through(open_folder(path), held(path, claims), source)


def die_of(path, row):
    process = multiprocessing.get_context("fork").Process(target=look, args=(path, row))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def suspect(path):
    with Claims(open_folder(path), fake_plan().key(), purpose="asking", job="j") as claims:
        return suspect_of(open_folder(path), held(path, claims))


def test_two_deaths_of_one_image_name_it(path):
    die_of(path, 12)
    die_of(path, 12)
    line = suspect(path)
    assert line["row"] == 12
    # With the claim given up, what was noted is gone.
    assert suspect(path) is None


def test_deaths_of_different_images_name_none(path):
    die_of(path, 12)
    die_of(path, 8)
    assert suspect(path) is None


def test_whoever_lives_leaves_no_note_and_refused_images_are_passed_over(path):
    die_of(path, 15)
    with Claims(open_folder(path), fake_plan().key(), purpose="looking", job="j") as claims:
        job = held(path, claims)
        source = FakeSource(Readers(open_folder(path), [FakeReader(16, bad=[9])]))
        look_through(open_folder(path), job, source)
        assert source.n_loads == 8
        notes = notes_of(StoreFolder(path), job.folder.key, SHARD)
        assert [note.read_text().strip() for note in notes.iterdir()] == ["15"]

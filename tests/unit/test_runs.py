from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from featstore.errors import ConflictError, FormatError, NotFoundError, StorageError
from featstore.store import create_folder
from heads.runs import (
    find_run,
    held,
    is_held,
    list_runs,
    new_run_id,
    read_run,
    remove_run,
    writable_runs_folder,
    write_record,
)

FIRST = "deap-depth-20261121-051200-3f9a"
SECOND = "deap-depth-20261121-051200-3f00"
THIRD = "linear-depth-20261122-070000-aaaa"


@pytest.fixture
def store(tmp_path):
    folder = create_folder(tmp_path / "s.zarr", library="test")
    for number, run_id in enumerate((FIRST, SECOND, THIRD)):
        created = f"2026-11-21T0{number}:00:00+00:00"
        write_record(folder.runs_path / run_id, {"status": "done", "created": created})
    return folder


def test_an_id_is_readable_and_ends_in_something_random():
    pattern = r"deap-depth-\d{8}-\d{6}-[0-9a-f]{4}"
    ids = {new_run_id("deap.v1", "depth.v1") for _ in range(20)}
    assert len(ids) > 10
    assert all(re.fullmatch(pattern, run_id) for run_id in ids)


def test_runs_are_listed_oldest_first(store):
    assert [run.run_id for run in list_runs(store.path)] == [FIRST, SECOND, THIRD]


@pytest.mark.parametrize("text", [FIRST, "deap-depth-20261121-051200-3f9"])
def test_a_run_is_found_by_its_id_or_the_start_of_it(store, text):
    assert find_run(store.path, text).run_id == FIRST


def test_the_last_run_is_the_newest(store):
    assert find_run(store.path, "@last").run_id == THIRD


def test_a_start_that_fits_several_names_them(store):
    with pytest.raises(NotFoundError, match=rf"2 runs start with 'deap': {FIRST}, {SECOND}"):
        find_run(store.path, "deap")


def test_an_unknown_run_names_the_nearest(store):
    with pytest.raises(NotFoundError, match=f"Did you mean '{THIRD}'"):
        find_run(store.path, "linaer-depth-20261122-070000-aaaa")


@pytest.mark.parametrize("text", ["", "@first"])
def test_nothing_is_guessed(store, text):
    with pytest.raises(NotFoundError, match="Unknown run"):
        find_run(store.path, text)


def test_without_a_run_the_message_says_how_to_make_one(tmp_path):
    create_folder(tmp_path / "s.zarr", library="test")
    with pytest.raises(NotFoundError, match="heads train"):
        find_run(tmp_path / "s.zarr", "@last")


def test_runs_of_another_folder_need_no_store(tmp_path):
    write_record(tmp_path / "mine" / FIRST, {"status": "done"})
    assert find_run(tmp_path / "none", "@last", runs=tmp_path / "mine").run_id == FIRST


def test_a_removed_run_is_gone(store):
    assert remove_run(store.path, THIRD) == THIRD
    assert not (store.runs_path / THIRD).exists()
    assert [run.run_id for run in list_runs(store.path)] == [FIRST, SECOND]


def test_a_run_that_trains_is_not_removed(store):
    with held(store.runs_path / FIRST), pytest.raises(ConflictError, match="still training"):
        remove_run(store.path, FIRST)
    assert find_run(store.path, FIRST).run_id == FIRST


def test_a_killed_run_is_seen_as_interrupted(store):
    path = store.runs_path / FIRST
    write_record(path, {"status": "running"})
    code = (
        "import os, pathlib, sys; from heads.runs import held, is_held\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with held(path):\n    print('held', flush=True); sys.stdin.read()\n    os._exit(9)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert is_held(path)
        assert read_run(path).status == "running"
        child.communicate()
    assert read_run(path).status == "interrupted"


def test_a_damaged_record_is_named(store):
    (store.runs_path / FIRST / "run.json").write_text("{")
    with pytest.raises(FormatError, match=rf"{FIRST}/run.json is damaged"):
        list_runs(store.path)


@pytest.mark.parametrize("record", [[], {}, "done"])
def test_a_record_of_another_shape_is_damage(store, record):
    (store.runs_path / FIRST / "run.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match="damaged"):
        read_run(store.runs_path / FIRST)


def test_a_folder_without_a_record_is_no_run(tmp_path):
    with pytest.raises(NotFoundError, match="No run at"):
        read_run(tmp_path)


def test_a_read_only_store_asks_for_another_folder(store, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(StorageError, match="--runs DIR"):
        writable_runs_folder(store, None)
    assert writable_runs_folder(store, tmp_path / "mine") == tmp_path / "mine"

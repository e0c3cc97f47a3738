"""What the tests of growing and shrinking share: what a store must answer, and frozen disks."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

import featstore
from featstore import index
from featstore.errors import NotFoundError
from featstore.store import open_folder
from featstore.verify import verify
from tests.fakes import SHAPES, FakeReader, fake_extract, fake_plan

KEY = fake_plan().key()
TAPS = tuple(shape.tap for shape in SHAPES)


N = 20
READER = {"bad": [3]}


def make_whole(tmp_path_factory):
    """Extract the store that tests take rows from."""
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    fake_extract(path, [FakeReader(N, **READER)])
    return path


def folder_of(path):
    return open_folder(path).feature_set(KEY)


def listed(path, dataset="fake"):
    """Give the rows in `samples` by the path of their item; an image that stands twice fails."""
    lines = index.samples(path, f"dataset = '{dataset}'", KEY).to_pylist()
    rows = {}
    for line in lines:
        rows.setdefault((line["path"], line["view"]), set()).add(line["row"])
    assert all(len(found) == 1 for found in rows.values()), "an image has two rows"
    return {path: found.pop() for (path, view), found in rows.items() if view == "plain"}


def numbers(path, rows, taps=TAPS):
    """Read rows by the path of their item: every array's bytes."""
    features = featstore.open(path).feature_set(KEY)
    names = [f"{tap}{part}" for tap in taps for part in ("", "/prefix")]
    known = [name for name in names if name.endswith("/prefix") is False or ".mean" not in name]
    values = {name: features.read(name, list(rows.values())) for name in known} if rows else {}
    return {
        item: {name: block[place].tobytes() for name, block in values.items()}
        for place, item in enumerate(rows)
    }


def check(path, expected, taps=TAPS):
    """Assert that a store lists just `expected`, gives its numbers, and has nothing damaged."""
    rows = listed(path)
    assert rows.keys() == expected.keys()
    found = numbers(path, rows, taps)
    for item, by_name in found.items():
        assert by_name == {name: expected[item][name] for name in by_name}, item
    assert verify(path).problems == []


def check_old_rows(path, old, expected):
    """Assert that row numbers of before give what they gave, or say that they are gone."""
    features = featstore.open(path).feature_set(KEY)
    for item, row in old.items():
        if item in expected:
            assert features.read("norm", [row]).tobytes() == expected[item]["norm"]
        else:
            with pytest.raises(NotFoundError, match="removed"):
                features.read("norm", [row])


class Killed(BaseException):
    """The process is dead: nothing of what it would still do reaches the disk."""


@contextlib.contextmanager
def dying_disk(monkeypatch, root, n_changes):
    """Let `n_changes` changes below `root` through, then none; give how many were asked for.

    What cleans up afterwards changes nothing either, as if the process had been killed. The index
    and the locks, which are no content, go on.
    """
    asked = {"changes": 0, "is_dead": False}

    def guard(name):
        original = getattr(Path, name)

        def guarded(self, *args, **options):
            if root in self.parents and not _is_no_content(self.relative_to(root)):
                asked["changes"] += 1
                if asked["changes"] > n_changes:
                    asked["is_dead"] = True
                    raise Killed
            return original(self, *args, **options)

        patch.setattr(Path, name, guarded)

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rename", "rmdir"):
            guard(name)
        yield asked


def _is_no_content(path):
    return path.parts[0] == ".locks" or path.name.startswith(("index.duckdb", ".lock"))

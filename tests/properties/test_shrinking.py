"""Whatever is extracted, removed, moved, freed and copied: a store answers as a dict would."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featstore.cleanup import gc
from featstore.compaction import compact
from featstore.copying import copy_store, merge_stores
from featstore.errors import NotFoundError
from featstore.removal import remove_rows
from tests.fakes import SHAPES, FakeReader, fake_extract
from tests.shrinking import check, check_old_rows, listed, numbers

N = 10
Numbers = dict[str, dict[str, bytes]]
fresh = itertools.count()


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "s.zarr"
    fake_extract(path, [FakeReader(N)])
    return numbers(path, listed(path))


def extract(path: Path, model: set[str], n: int) -> tuple[Path, set[str]]:
    fake_extract(path, [FakeReader(n)], shapes=SHAPES, shard_rows=4)
    return path, model | {f"{number:05d}.npy" for number in range(n)}


def remove(path: Path, model: set[str], n: int) -> tuple[Path, set[str]]:
    gone = {item for item in model if int(item[:5]) % 3 == n % 3}
    names = ", ".join(f"'{item}'" for item in sorted(gone)) or "'none'"
    if gone:
        remove_rows(path, f"path in ({names})")
    else:
        with pytest.raises(NotFoundError):
            remove_rows(path, f"path in ({names})")
    return path, model - gone


def move(path: Path, model: set[str], n: int) -> tuple[Path, set[str]]:
    compact(path, min_removed=0.1 + n / 20)
    return path, model


def free(path: Path, model: set[str], n: int) -> tuple[Path, set[str]]:
    gc(path, grace_s=float(n % 2))
    return path, model


def copy(path: Path, model: set[str], n: int) -> tuple[Path, set[str]]:
    if not model:
        return path, model
    target = path.with_name(f"{next(fresh)}.zarr")
    copy_store(path, target)
    return target, model


def merge(path: Path, model: set[str], n: int) -> tuple[Path, set[str]]:
    other, target = (path.with_name(f"{next(fresh)}.zarr") for _ in range(2))
    _, theirs = extract(other, set(), max(1, n - 2))
    merge_stores([path, other], target)
    return target, model | theirs


STEPS: tuple[Callable[..., tuple[Path, set[str]]], ...] = (
    extract,
    remove,
    remove,
    move,
    move,
    free,
    copy,
    merge,
)


@settings(
    deadline=None, max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, N)), min_size=3, max_size=5))
def test_any_sequence_of_steps_leaves_what_a_dict_would(tmp_path, truth, steps):
    folder = tmp_path / str(next(fresh))
    folder.mkdir()
    path, model = extract(folder / "s.zarr", set(), N - 2)
    for step, n in steps:
        old = listed(path)
        before = path
        path, model = step(path, model, n)
        expected = {item: truth[item] for item in model}
        check(path, expected)
        if step in (move, free):
            check_old_rows(before, old, expected)
    shutil.rmtree(folder)

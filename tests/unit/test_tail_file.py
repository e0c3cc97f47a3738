"""The stored tail: read back, grown, killed on the way, damaged, and used without timm."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

from featstore import tail_file
from featstore.errors import FormatError, InvalidInputError, NotFoundError
from featstore.store import FeatureSetFolder, open_folder
from featstore.tail import NormSpec, RopeSpec, TailSpec, TailWeights, plain_block
from featstore.tail_file import TAIL_FILE, find_tail, read_tail, write_tail
from featstore.verify import verify
from tests.fakes import FakeReader, content, fake_extract, fake_plan

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.unit.test_tail_file"])


def some_tail(n_blocks, *, seed=0):
    """Describe the last blocks of a backbone of four; more of them are a longer end of the same."""
    block = plain_block(4, 2, rope="half")
    spec = TailSpec(
        first=4 - n_blocks,
        blocks=(block,) * n_blocks,
        n_prefix=1,
        norm=NormSpec(eps=0.5),
        rope=RopeSpec(n_frequencies=1, reference=(3, 4), offset=0.5),
    )
    tensors = {"norm.weight": np.ones(4, np.float32), "rope.frequencies": np.ones(1, np.float32)}
    for number in range(n_blocks):
        random = np.random.default_rng([seed, spec.first + number])
        tensors[f"blocks.{number}.mlp.fc1.weight"] = random.normal(size=(16, 4)).astype(np.float32)
    return TailWeights(spec=spec, tensors=tensors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    fake_extract(path, [FakeReader(9)])
    return path


@pytest.fixture
def path(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def folder_of(path):
    return open_folder(path).feature_set(fake_plan().key())


def assert_same(found, expected):
    assert found.spec == expected.spec
    assert found.tensors.keys() == expected.tensors.keys()
    for name, values in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], values)


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
def test_a_tail_reads_back_whole_and_in_part(path, n_blocks):
    write_tail(folder_of(path), some_tail(3))
    assert_same(read_tail(folder_of(path), n_blocks), some_tail(n_blocks))
    assert find_tail(folder_of(path)) == some_tail(3).spec
    assert verify(path).ok


def test_a_larger_tail_replaces_a_smaller_one_and_a_smaller_one_is_not_written(path, whole):
    write_tail(folder_of(path), some_tail(2))
    small = content(path)
    write_tail(folder_of(path), some_tail(3))
    large = content(path)
    assert small.keys() == large.keys()
    assert {name for name in small if small[name] != large[name]} == {
        f"feature_sets/{fake_plan().key()}/{name}" for name in (TAIL_FILE, "zarr.json")
    }
    write_tail(folder_of(path), some_tail(1))
    assert content(path) == large


def _die(n_events):
    """Kill this process at the n-th moment before or after a write of `tail_file`."""
    left = n_events

    def deadly(write):
        def wrapped(*arguments):
            nonlocal left
            for step in (lambda: None, lambda: write(*arguments)):
                step()
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        return wrapped

    tail_file.write_bytes = deadly(tail_file.write_bytes)
    tail_file.write_attributes = deadly(tail_file.write_attributes)


def _write_and_die(path, n_blocks, n_events):
    _die(n_events)
    write_tail(FeatureSetFolder(path), some_tail(n_blocks))


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("n_events", range(6))  # before and after each of three writes
def test_killed_between_two_writes_the_store_is_good_and_a_rerun_ends_the_same(
    path, tmp_path, before, n_events
):
    if before:
        write_tail(folder_of(path), some_tail(before))
    undisturbed = tmp_path / "undisturbed.zarr"
    shutil.copytree(path, undisturbed)
    write_tail(folder_of(undisturbed), some_tail(3))
    process = CONTEXT.Process(target=_write_and_die, args=(folder_of(path).path, 3, n_events))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert verify(path).ok
    is_new = n_events >= 3
    if is_new or before:
        assert_same(read_tail(folder_of(path), 2), some_tail(2))
        assert find_tail(folder_of(path)).n_blocks == (3 if is_new else before)
    else:
        assert find_tail(folder_of(path)) is None
        with pytest.raises(NotFoundError, match="has no tail"):
            read_tail(folder_of(path), 1)
    write_tail(folder_of(path), some_tail(3))
    assert content(path) == content(undisturbed)


def test_a_reader_that_saw_the_smaller_tail_finds_the_larger(path, monkeypatch):
    write_tail(folder_of(path), some_tail(2))
    seen = [tail_file._records(folder_of(path).path)]
    write_tail(folder_of(path), some_tail(3))
    fresh = tail_file._records
    monkeypatch.setattr(tail_file, "_records", lambda p: seen.pop() if seen else fresh(p))
    assert_same(read_tail(folder_of(path), 2), some_tail(2))
    assert seen == []


def flip(data, random):
    bit = int(random.integers(len(data) * 8))
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda data, random: data[: int(random.integers(len(data)))],
    "lengthened": lambda data, random: data + b"x",
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_written_anew(path, damage):
    write_tail(folder_of(path), some_tail(2))
    expected = content(path)
    file = folder_of(path).path / TAIL_FILE
    good = file.read_bytes()
    for seed in range(1 if damage in ("gone", "lengthened") else 8):
        file.unlink()
        if DAMAGES[damage] is not None:
            file.write_bytes(DAMAGES[damage](good, np.random.default_rng(seed)))
        with pytest.raises(FormatError, match=r"tail\.safetensors is missing or damaged.*--tail 2"):
            read_tail(folder_of(path), 1)
        (problem,) = verify(path).problems
        assert (problem.kind, problem.feature_set) == ("tail", fake_plan().key())
        write_tail(folder_of(path), some_tail(2))
        assert content(path) == expected


def test_the_tail_of_another_feature_set_is_damage(path):
    write_tail(folder_of(path), some_tail(2))
    other = path.with_name("other.zarr")
    shutil.copytree(path, other)
    (folder_of(other).path / TAIL_FILE).unlink()
    write_tail(folder_of(other), some_tail(2, seed=1))
    shutil.copy(folder_of(other).path / TAIL_FILE, folder_of(path).path)
    assert [problem.kind for problem in verify(path).problems] == ["tail"]


@pytest.mark.parametrize("records", [[{}], [3], 7, [{"bytes": 1, "sha256": "x", "spec": {}}]])
def test_attributes_that_describe_no_tail_are_one_clear_error(path, records):
    write_tail(folder_of(path), some_tail(1))
    tail_file.write_attributes(
        folder_of(path).path, {**folder_of(path).attributes, "tail": records}
    )
    with pytest.raises(FormatError):
        read_tail(folder_of(path), 1)
    assert "tail" in {problem.kind for problem in verify(path).problems}


def test_no_blocks_are_no_tail(path):
    with pytest.raises(InvalidInputError, match="`n_blocks` must be at least 1"):
        read_tail(folder_of(path), 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"first": 0}, "one block before it"),
        ({"blocks": ()}, "at least one block"),
    ],
)
def test_a_description_that_cannot_be_is_refused(change, match):
    with pytest.raises(InvalidInputError, match=match):
        replace(some_tail(2).spec, **change)

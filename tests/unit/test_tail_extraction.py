"""Tails that extractions store: what is used again, what is told, and what trains from them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cli.featstore_app import featstore
from featstore.api import open as open_store
from featstore.errors import FormatError, InvalidInputError, NotFoundError
from featstore.extract import extract
from featstore.tail_file import TAIL_FILE
from featstore.verify import verify
from heads.vit_block import load_tail
from tests.fakes import content
from tests.tiny_backbones import tiny_backbone

ROOT = Path(__file__).resolve().parents[2]
DATA = "rooms:n=3,seed=0,size=48x64"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):

    folder = tmp_path_factory.mktemp("backbone")
    tiny_backbone(folder, "registers and LayerScale")
    return f"local-dir:{folder}/registers_and_LayerScale"


@pytest.fixture(scope="module")
def stored(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "s.zarr"
    run(path, backbone, taps=["block:1", "norm"])
    return path


@pytest.fixture
def store(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def run(path, backbone, **options):
    return extract(path, backbone=backbone, data=[DATA], image_size=(42, 56), **options)


def test_a_tail_is_added_without_extracting_a_row_again(store, backbone):
    before = content(store)
    report = run(store, backbone, taps=["block:1", "norm"], tail=2)
    assert (report.rows, report.new_rows, report.reused_rows, report.tail) == (3, 0, 3, 2)
    after = content(store)
    names = {name for name in after if before.get(name) != after[name]}
    assert {Path(name).name for name in names} == {TAIL_FILE, "zarr.json"}
    again = run(store, backbone, taps=["norm"], tail=1)
    assert again.tail == 2
    assert content(store) == after


def test_stored_tokens_and_stored_blocks_give_the_stored_norm(store, backbone):

    run(store, backbone, taps=["block:1", "norm"], tail="auto")
    features = open_store(store).feature_set()
    assert features.tail_spec.input_tap == "block:1"
    state = torch.random.get_rng_state()
    tail = load_tail(features, 2)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    rows = [0, 1, 2]
    start, end = (
        np.concatenate([features.read(f"{tap}/prefix", rows), features.read(tap, rows)], axis=1)
        for tap in ("block:1", "norm")
    )
    found = tail(torch.from_numpy(start), features.taps["norm"].grid)
    expected = torch.from_numpy(end.astype(np.float32))
    assert (found - expected).abs().max() < 0.003 * expected.abs().max()


def test_the_command_that_an_error_names_adds_what_lacks(store):

    with pytest.raises(NotFoundError, match="has no tail, and 1 block is") as raised:
        load_tail(open_store(store).feature_set(), 1)
    words = shlex.split(str(raised.value).split("`")[1])
    assert words[:2] == ["featstore", "extract"]
    done = CliRunner().invoke(featstore, [*words[1:], "--json"])
    assert done.exit_code == 0, done.output
    assert len(open_store(store).feature_sets()) == 1
    assert load_tail(open_store(store).feature_set(), 1).spec.input_tap == "block:2"
    with pytest.raises(NotFoundError, match=r"a tail of 1, and 3 blocks.*block:0.*--tail 3"):
        load_tail(open_store(store).feature_set(), 3)
    with pytest.raises(NotFoundError, match="backbone cannot have it"):
        load_tail(open_store(store).feature_set(), 4)


def test_a_refusal_leaves_no_store(tmp_path, backbone):
    with pytest.raises(InvalidInputError, match="from 1 to 3 for the 4 blocks"):
        run(tmp_path / "s.zarr", backbone, tail=4)
    assert not (tmp_path / "s.zarr").exists()


def test_a_tail_that_no_tap_feeds_is_told(tmp_path, backbone):
    told = []
    run(tmp_path / "s.zarr", backbone, taps=["norm"], tail=1, progress=told.append)
    texts = [report.message for report in told if report.message]
    assert texts == ["None of the taps of this run feeds the tail, which takes block:2."]


def test_a_norm_that_is_gone_is_seen_and_written_anew(store, backbone):
    before = content(store)
    features = open_store(store).feature_set()
    file = features.folder.path / "norm.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match="Delete it and run the extraction again"):
        features.final_norm()
    file.unlink()
    with pytest.raises(FormatError, match="Delete it and run the extraction again"):
        features.final_norm()
    assert [problem.kind for problem in verify(store).problems] == ["norm"]
    run(store, backbone, taps=["norm"])
    assert content(store) == before


def test_it_loads_and_trains_where_timm_cannot_be_imported(store, backbone):
    run(store, backbone, taps=["norm"], tail=2)
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "timm" or name.startswith("featstore.backbones"):
            raise ImportError(f"{name} is not available here")
sys.meta_path.insert(0, Blocker())
import torch
import featstore
from heads.vit_block import load_tail
features = featstore.open(sys.argv[1]).feature_set()
tail = load_tail(features, 2)
tokens = [torch.from_numpy(features.read(name, [0])) for name in ("block:1/prefix", "block:1")]
frozen = [buffer.clone() for buffer in tail.buffers()]
optimiser = torch.optim.SGD(tail.parameters(), lr=0.1)
tail(torch.cat(tokens, dim=1), features.taps["block:1"].grid).square().mean().backward()
before = [parameter.clone() for parameter in tail.parameters()]
optimiser.step()
assert all(not torch.equal(*pair) for pair in zip(before, tail.parameters()))
assert all(torch.equal(*pair) for pair in zip(frozen, tail.buffers()))
"""
    subprocess.run([sys.executable, "-c", code, str(store)], cwd=ROOT, check=True)


def test_the_store_lists_it(store, backbone):

    run(store, backbone, taps=["norm"], tail=2)
    listed = CliRunner().invoke(featstore, ["ls", "--store", str(store)]).output.splitlines()
    assert "tail" in listed[0].split()
    assert listed[2].split()[-3:] == ["2", "block:1", "norm"]
    key = open_store(store).feature_set().key
    told = CliRunner().invoke(featstore, ["info", key, "--store", str(store)]).output
    assert "tail " in told
    assert "last 2 blocks and the final norm" in told


def test_imported_features_have_no_tail(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 3), np.float32))
    (tmp_path / "x.csv").write_text("path\na.png\nb.png\n")
    with pytest.raises(InvalidInputError, match="Leave out --tail"):
        extract(
            tmp_path / "s.zarr", data=[f"features:{tmp_path / 'x.npy'},tap=norm,grid=2x2"], tail=1
        )

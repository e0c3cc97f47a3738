"""From a store to a token file: training with identities, holding some out, adapting to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.torch
import torch

import heads
from cli.common import exit_code
from cli.heads_app import heads as program
from featstore.errors import FormatError, InvalidInputError, NotFoundError
from featstore.types import Item
from heads.adapt import AdaptChoices, adapt
from heads.adaptation import Recipe
from heads.model import load
from heads.runs import read_run
from heads.token_file import (
    TokenFile,
    read_token,
    use_token,
    weights_hash,
    write_token,
)
from tests.fake_animals import Animals
from tests.fakes import fake_extract

OPTIONS = {"heads": 2, "ff": 16, "hidden": 8, "checks": 2, "pictures": 0, "balance": "identity"}
FEW = Recipe(steps=30)


class Marked(Animals):
    """The last identity of all has no visible keypoint."""

    def items(self) -> list[Item]:
        hidden = [[0, 0, 0]] * 3
        return [
            item
            if item.label != self.identities[-1]
            else replace(item, attributes={**item.attributes, "keypoints": hidden})
            for item in super().items()
        ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of five species, and a run that has not seen the elk."""
    folder = tmp_path_factory.mktemp("animals")
    fake_extract(folder / "s.zarr", [Marked(80, n_identities=5)])
    return train(folder / "s.zarr"), folder


def train(store, **changes):
    chosen = {"task": "pose", "head": "identity_token", "steps": 40, "batch_size": 16, "lr": 1e-3}
    chosen |= {"holdout": ("elk",), "device": "cpu", "options": OPTIONS} | changes
    return heads.train(store, **chosen)


def test_a_run_has_a_token_for_each_identity_it_saw_and_curves_of_their_spread(made):
    report, _ = made
    record = read_run(Path(report.path)).record
    assert record["options"]["head"]["tokens"] == "cat|dog|fox"  # nobody knows a hidden hare
    assert record["options"]["train"]["holdout"] == "elk"
    labels = pq.read_table(Path(report.path) / "pairs.parquet")["label"].to_pylist()
    assert "elk" not in labels
    curves = pq.read_table(Path(report.path) / "curves.parquet").to_pylist()
    spread = [line["value"] for line in curves if line["name"] == "token_std"]
    assert len(spread) == 2
    assert report.learned["token_std"] in [pytest.approx(value) for value in spread]
    assert report.learned["token_parameters"] == 3 * 8
    assert report.parameters == report.learned["decoder_parameters"] + 24


def test_a_resumed_run_keeps_its_tokens_and_ends_as_an_undisturbed_one(made, tmp_path):
    report, folder = made
    store = shutil.copytree(folder / "s.zarr", tmp_path / "s.zarr")
    shutil.rmtree(store / "runs")

    def interrupt(progress):
        if progress.stage == "train" and progress.done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(store, progress=interrupt)
    again = heads.train(store, resume="@last", device="cpu")
    ours, theirs = (
        safetensors.torch.load_file(Path(each.path) / "head.safetensors")
        for each in (again, report)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert again.learned == report.learned


def test_an_adapted_token_is_saved_and_measured_and_the_run_stays_as_it_is(made, in_folder):
    report, _ = made
    before = (Path(report.path) / "head.safetensors").read_bytes()
    found = adapt(report.path, AdaptChoices(identity="elk", shots=3, seeds=2), FEW, device="cpu")
    assert (Path(report.path) / "head.safetensors").read_bytes() == before
    assert [one.path for one in found.tokens] == ["elk-0.safetensors", "elk-1.safetensors"]
    assert (found.parameters, found.shots, found.test_images) == (8, 3, 4)
    assert not found.was_trained
    assert found.tokens[0].support != found.tokens[1].support
    for one in found.tokens:
        assert len(one.support) == 3
        assert one.loss < one.loss_before
        assert one.loss_stored == one.loss  # float32 rounds nothing
        assert one.metrics.keys() == found.mean_token.keys()
        assert one.metrics["rmse"] != found.mean_token["rmse"]
        with safetensors.safe_open(one.path, framework="np") as file:
            assert list(file.keys()) == ["token"]
            assert file.get_tensor("token").shape == (8,)
    assert json.loads(json.dumps(found.to_json()))["tokens"][0]["path"] == "elk-0.safetensors"


def test_shots_are_nested_and_all_of_them_leave_the_test_split_out(made, in_folder):
    report, _ = made
    names = {}
    for shots in (2, 5, None):
        choices = AdaptChoices(identity="elk", shots=shots)
        names[shots] = set(
            adapt(report.path, choices, Recipe(steps=1), device="cpu").tokens[0].support
        )
    assert names[2] < names[5] < names[None]
    of_elk = [item for item in Marked(80, n_identities=5).items() if item.label == "elk"]
    assert names[None] == {item.path for item in of_elk if item.splits == ("train",)}


@pytest.mark.parametrize("mode", ["token+norms", "decoder", "token+lora:rank=2", "prompts"])
def test_what_is_trained_beside_a_token_is_in_its_file_too(made, in_folder, mode):
    report, _ = made
    choices = AdaptChoices(identity="elk", shots=2)
    found = adapt(report.path, choices, Recipe(mode=mode, steps=3), device="cpu")
    saved = read_token(found.tokens[0].path)
    assert found.tokens[0].path != "elk.safetensors"
    assert saved.mode == mode
    n_token = 8 if mode.startswith("token") else 0
    assert sum(v.numel() for v in saved.weights.values()) + n_token == found.parameters
    assert found.tokens[0].loss_stored == pytest.approx(found.tokens[0].loss)
    assert found.tokens[0].loss != found.tokens[0].loss_before


@pytest.mark.parametrize("init", ["random", "interpolated"])
def test_the_first_token_is_chosen(made, in_folder, init):
    report, _ = made
    choices = AdaptChoices(identity="elk", shots=2)
    plain = adapt(report.path, choices, Recipe(steps=1), device="cpu")
    other = adapt(report.path, replace(choices, init=init), Recipe(steps=1), device="cpu")
    assert other.tokens[0].loss_before != plain.tokens[0].loss_before
    assert other.mean_token == plain.mean_token


def test_a_token_of_768_numbers_takes_3_kb_and_in_int8_less_than_1(tmp_path):
    token = torch.randn(768, generator=torch.Generator().manual_seed(0))
    saved = TokenFile(
        run_id="identity_token-pose-20260101-000000-abcd",
        weights_hash="0123456789abcdef",
        identity="african elephant",
        token=token,
    )
    assert 3072 < write_token(tmp_path / "f.safetensors", saved) < 3500
    assert torch.equal(read_token(tmp_path / "f.safetensors").token, token)
    n_bytes = write_token(tmp_path / "i.safetensors", saved, dtype="int8")
    assert n_bytes == (tmp_path / "i.safetensors").stat().st_size < 1000
    back = read_token(tmp_path / "i.safetensors")
    assert (back.token - token).abs().max() <= 0.501 * token.abs().max() / 127
    assert (back.run_id, back.identity, back.mode) == (saved.run_id, saved.identity, "token")
    zero = replace(saved, token=torch.zeros(768))
    write_token(tmp_path / "z.safetensors", zero, dtype="int8")
    assert not read_token(tmp_path / "z.safetensors").token.any()


def test_an_int8_token_is_measured_as_it_is_read_back(made, in_folder):
    report, _ = made
    choices = AdaptChoices(identity="elk", shots=3, token_dtype="int8")
    (one,) = adapt(report.path, choices, FEW, device="cpu").tokens
    assert 0 < abs(one.loss_stored - one.loss) < 0.05 * one.loss
    model = load(report.path)
    use_token(model, read_run(Path(report.path)), read_token(one.path))
    assert model.head._token.abs().max() > 0


def test_images_that_a_token_learned_from_are_not_measured_unless_asked(
    made, in_folder, capsys, monkeypatch
):
    report, folder = made
    adapt(report.path, AdaptChoices(identity="elk", shots=3), Recipe(steps=2), device="cpu")

    def measured(**changes):
        given = {"split": "train", "device": "cpu", **changes}
        return heads.evaluate(read_run(Path(report.path)), store=folder / "s.zarr", **given)

    without = measured(token="elk.safetensors")
    every = measured(token="elk.safetensors", with_support=True)
    assert (without.support, every.support) == (3, 0)
    assert without.images == every.images - 3
    assert without.metrics["rmse"] != every.metrics["rmse"]
    assert measured(token="mean", identity="elk").images == every.images
    words = ["evaluate", report.run_id, "--store", str(folder / "s.zarr"), "--device", "cpu"]
    words += ["--split", "train", "--token", "elk.safetensors"]
    assert exit_code(program, words) == 0
    assert "Left out: 3 images that the token has learned from." in capsys.readouterr().out
    adapt(report.path, AdaptChoices(identity="elk"), Recipe(steps=1), device="cpu")
    with pytest.raises(InvalidInputError, match=r"learned from all 12 instances.*--with-support"):
        measured(token="elk.safetensors")
    # Where the run cannot be written, the file itself says it.
    monkeypatch.setattr("heads.token_file._NOTES", "run.json")
    adapt(report.path, AdaptChoices(identity="elk", shots=2), Recipe(steps=1), device="cpu")
    assert len(read_token("elk.safetensors").support) == 2
    monkeypatch.undo()
    monkeypatch.chdir(in_folder)
    assert measured(token="elk.safetensors").support == 2


def test_a_token_of_another_run_or_another_head_is_refused(made, in_folder):
    report, folder = made
    run = read_run(Path(report.path))
    adapt(report.path, AdaptChoices(identity="elk", shots=1), Recipe(steps=1), device="cpu")
    saved = read_token("elk.safetensors")
    other = replace(saved, weights_hash="f" * 16, run_id="identity_token-pose-x")
    with pytest.raises(InvalidInputError, match=r"of run .*other weights.*heads adapt .*'elk'"):
        use_token(load(run), run, other)
    wide = replace(saved, token=torch.zeros(9))
    with pytest.raises(InvalidInputError, match="8 finite numbers, as wide as the head"):
        use_token(load(run), run, wide)
    lacking = replace(saved, mode="token+queries")
    with pytest.raises(InvalidInputError, match=r"the weights that token\+queries trains"):
        use_token(load(run), run, lacking)
    plain = train(folder / "s.zarr", head="linear_pool", steps=2, options={"pictures": 0})
    with pytest.raises(InvalidInputError, match="one of the head identity_token"):
        adapt(plain.path, AdaptChoices(identity="elk"), device="cpu")
    with pytest.raises(InvalidInputError, match="the head of this run takes none"):
        use_token(load(plain.path), read_run(Path(plain.path)), saved)
    assert weights_hash(run) == saved.weights_hash != weights_hash(read_run(Path(plain.path)))


def test_what_is_no_token_file_is_said(made, in_folder):
    with pytest.raises(NotFoundError, match="No token file at none"):
        read_token("none.safetensors")
    Path("bad.safetensors").write_bytes(b"no")
    with pytest.raises(FormatError, match="no token file, or damaged"):
        read_token("bad.safetensors")
    with pytest.raises(FormatError, match="no token file"):
        read_token(Path(made[0].path) / "head.safetensors")


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"identity": "elx"}, NotFoundError, "'elx'. Did you mean 'elk'"),
        ({"identity": "elk", "shots": 99}, InvalidInputError, "at most 12, the labelled images of"),
        ({"identity": "hare"}, InvalidInputError, "None of the 16 instances of hare .* is marked"),
    ],
)
def test_an_identity_that_cannot_be_learned_is_said(made, in_folder, choices, error, message):
    with pytest.raises(error, match=message):
        adapt(made[0].path, AdaptChoices(**choices), device="cpu")
    assert list(in_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "1 or more"),
        ({"seeds": 0}, "1 or more"),
        ({"init": "best"}, "one of mean, random, interpolated"),
        ({"token_dtype": "int4"}, "one of float32, int8"),
    ],
)
def test_a_wrong_choice_is_named_with_what_is_right(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        AdaptChoices(identity="elk", **changes)


def test_the_command_tells_what_it_did(made, in_folder, capsys):
    report, folder = made
    words = ["adapt", report.run_id, "--identity", "elk", "--shots", "2", "--steps", "2"]
    words += ["--store", str(folder / "s.zarr"), "--device", "cpu"]
    assert exit_code(program, [*words, "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "8 parameters (token), 2 steps" in out
    assert "elk-0.safetensors" in out
    assert "over seeds" in out
    assert "more metrics of single keypoints: --json lists all." in out
    assert "pck@0.05 " in out
    assert "pck@0.05/" not in out
    assert exit_code(program, [*words, "--out", "e.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][0]["path"] == "e.safetensors"
    assert exit_code(program, [*words[:4], "--shots", "x"]) == 2
    assert "Give it as 5, or all" in capsys.readouterr().err
    assert exit_code(program, [*words, "--mode", "norms"]) == 1
    assert "Unknown mode 'norms'" in capsys.readouterr().err

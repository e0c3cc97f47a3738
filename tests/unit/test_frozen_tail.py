"""Identity tokens behind the backbone's own last blocks: frozen, but for methods that reach in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import heads
from cli import protocol_command
from cli.common import exit_code
from cli.heads_app import heads as program
from featstore.errors import InvalidInputError, NotFoundError
from featstore.tail import TailSpec, TailWeights, plain_block
from featstore.types import TapShape
from heads.adapt import AdaptChoices, adapt
from heads.adapt_modes import MODES, count_trained
from heads.adaptation import Images, Recipe, Start, adapt_many
from heads.base import TapTokens
from heads.build import build_head
from heads.describe import describe_head
from heads.model import load
from heads.peft import METHODS, add_method
from heads.runs import read_run
from heads.token_file import read_token, use_token
from heads.vit_block import BlockSpec, NormSpec, Tail
from tests.fake_animals import Animals
from tests.fakes import DIM, GRID, fake_extract

DEPTH, K = 4, 3
SHAPES = tuple(TapShape(tap=f"block:{n}", dim=DIM, grid=GRID, n_prefix=1) for n in range(DEPTH))
BACKBONE = {"name": "fake", "unit": "block", "depth": DEPTH, "n_prefix": 1}
OPTIONS = {"heads": 2, "ff": 16, "hidden": 8, "checks": 2, "pictures": 0, "tail_blocks": 2}
FEW = Recipe(steps=8)
BLOCK_PARAMETERS = 12 * DIM * DIM + 13 * DIM


def plain_tail(n_blocks: int) -> TailSpec:
    return TailSpec(first=DEPTH - n_blocks, blocks=(plain_block(DIM, 2),) * n_blocks, n_prefix=1)


def weights_of(spec: TailSpec) -> TailWeights:
    torch.manual_seed(7)
    state = {name: value + 0.02 for name, value in Tail(spec).state_dict().items()}
    return TailWeights(spec=spec, tensors={name: value.numpy() for name, value in state.items()})


def make_head(spec: TailSpec | None = None, **options):
    spec = spec or plain_tail(2)
    torch.manual_seed(0)
    options = {"heads": 2, "ff": 24, "hidden": 5, "tokens": "a|b", "tail_blocks": 2, **options}
    head = build_head(
        "identity_token", taps=[SHAPES[1]], n_outputs=2 * K, options=options, tail=spec
    )
    head.fill_tail(weights_of(spec))
    return head


def make_images(n=6, *, padded=False):
    generator = torch.Generator().manual_seed(1)
    n_tokens = GRID[0] * GRID[1]
    valid = torch.ones(n, n_tokens, dtype=torch.bool)
    valid[1, n_tokens // 2 :] = False
    tokens = TapTokens(
        patch=torch.randn(n, n_tokens, DIM, generator=generator),
        prefix=torch.randn(n, 1, DIM, generator=generator),
        grid=GRID,
        valid=valid if padded else None,
    )
    return Images(inputs=[tokens], targets={"points": torch.rand(n, 2 * K, generator=generator)})


class Points:
    def losses(self, output, targets):
        return (output[:, :, 0, 0] - targets["points"]).square().mean(dim=1)

    def loss(self, output, targets):
        return self.losses(output, targets).mean()


def start_of(head, n=5):
    return Start(token=head.mean_token().detach(), support=tuple(range(n)), seed=0)


@pytest.mark.parametrize("injection", ["memory", "film", "film_queries"])
def test_a_head_with_a_tail_reads_what_the_backbone_ends_with(injection):
    head, (tokens,) = make_head(injection=injection), make_images(padded=True).inputs
    tail = Tail(plain_tail(2))
    tail.load_state_dict(
        {name: torch.from_numpy(v) for name, v in weights_of(plain_tail(2)).tensors.items()}
    )
    final = tail(torch.cat([tokens.prefix, tokens.patch], dim=1), GRID)[:, 1:].detach()
    torch.manual_seed(0)
    options = {"heads": 2, "ff": 24, "hidden": 5, "tokens": "a|b", "injection": injection}
    norm = TapShape(tap="norm", dim=DIM, grid=GRID)
    plain = build_head("identity_token", taps=[norm], n_outputs=2 * K, options=options)
    read = [TapTokens(patch=final, grid=GRID, valid=tokens.valid)]
    assert torch.equal(head([tokens]), plain(read))
    assert head.n_parameters() == plain.n_parameters()
    head([tokens]).sum().backward()
    assert all(value.grad is None for value in head.tail.parameters())


@pytest.mark.parametrize("where", ["tail", "both"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_reaches_the_blocks_and_begins_as_if_it_did_not(method, where):
    head, images = make_head(), make_images()
    before = head(images.inputs)
    weights = {name: value.clone() for name, value in head.named_parameters()}
    add = add_method(head, f"{method}:where={where}", generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(images.inputs), before)
    assert any(name.startswith("tail.blocks.0.") for name in add)
    assert any(name.startswith("tail.blocks.1.") for name in add)
    assert any(not name.startswith("tail.") for name in add) == (where == "both")
    optimizer = torch.optim.Adam(add.values(), lr=0.02)
    start = {name: value.detach().clone() for name, value in add.items()}
    for _ in range(4):
        optimizer.zero_grad()
        loss = Points().loss(head(images.inputs), images.targets)
        loss.backward()
        optimizer.step()
    assert loss < Points().loss(before, images.targets)
    now = dict(head.named_parameters())
    kept = [name for name in now if name not in add]
    assert all(torch.equal(now[name], weights[_plain(name)]) for name in kept)
    still = [name for name, value in add.items() if torch.equal(value, start[name])]
    # A bias of keys moves all scores of a query alike; here it is a third of one bias.
    assert all(name.endswith("key.bias") for name in still)


def _plain(name: str) -> str:
    """Name a frozen weight as it was before a module was laid around it."""
    return name.replace(".linear.", ".").replace(".wide.", ".").replace(".attention.attention.", ".attention.").replace("cross.attention.", "cross.")  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("lora", 2 * 2 * 8 * DIM),
        ("lora:rank=3,targets=query+key+mix", 3 * 2 * 3 * DIM),
        ("bitfit", 11 * DIM),
        ("ia3", 2 * DIM + 4 * DIM),
        ("adaptformer:bottleneck=5", 2 * 5 * DIM + 5 + DIM),
        ("prompts:count=3", 3 * DIM + 2),
    ],
)
def test_a_method_trains_as_many_numbers_a_block_as_it_says(method, count):
    separator = "," if ":" in method else ":"
    assert count_trained(make_head(), f"{method}{separator}where=tail") == 2 * count
    one = count_trained(make_head(), method)
    assert count_trained(make_head(), f"{method}{separator}where=both") == 2 * count + one


GATED = BlockSpec(
    **{
        **{name: getattr(plain_block(DIM, 4), name) for name in BlockSpec.__slots__},
        "n_kv_heads": 2,
        "qkv_bias": "q_v",
        "qk_norm": NormSpec(kind="rms_norm", eps=1e-6, has_weight=True, has_bias=False),
        "mlp": "gated",
        "activation": "silu",
    }
)


NO_BIAS = NormSpec(kind="rms_norm", eps=1e-6, has_weight=True, has_bias=False)
BARE = replace(
    plain_block(DIM, 2), qkv_bias="none", proj_bias=False, mlp_bias=(False, False),
    norm1=NO_BIAS, norm2=NO_BIAS,
)  # fmt: skip


@pytest.mark.parametrize("method", ["lora:targets=query+key+value+mix", *METHODS])
def test_methods_fit_blocks_with_shared_keys_and_gates(method):
    spec = TailSpec(first=2, blocks=(GATED,) * 2, n_prefix=1)
    head, images = make_head(spec), make_images()
    before = head(images.inputs)
    separator = "," if ":" in method else ":"
    where = f"{method}{separator}where=tail"
    add = add_method(head, where, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(images.inputs), before)
    Points().loss(head(images.inputs), images.targets).backward()
    assert all(value.grad is not None for value in add.values())


@pytest.mark.parametrize("injection", ["memory", "film"])
@pytest.mark.parametrize(
    "mode", ["token", "decoder", "token+norms", "lora:where=tail", "token+bitfit:where=both"]
)
def test_what_is_computed_once_changes_no_step(mode, injection, monkeypatch):
    head, images = make_head(injection=injection), make_images(padded=True)
    recipe = Recipe(mode=mode, steps=4, batch_size=3)
    (quick,) = adapt_many(head, Points(), images, [start_of(head)], recipe, asked=images)
    monkeypatch.setattr("heads.adaptation._is_trained", lambda seen: True)  # compute all anew
    (slow,) = adapt_many(head, Points(), images, [start_of(head)], recipe, asked=images)
    torch.testing.assert_close(quick.losses, slow.losses)
    torch.testing.assert_close(quick.output, slow.output)
    assert quick.losses[-1] < quick.losses[0]
    assert any(name.startswith("tail.") for name in quick.weights) == ("where" in mode)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with a tail, and a run on it that has not seen the elk."""
    folder = tmp_path_factory.mktemp("tail")
    extract(folder / "s.zarr", tail=weights_of(plain_tail(3)))
    return train(folder / "s.zarr"), folder


def extract(path, **options):
    fake_extract(path, [Animals(60, n_identities=4)], shapes=SHAPES, backbone=BACKBONE, **options)


def train(store, **changes):
    chosen = {"task": "pose", "head": "identity_token", "steps": 12, "batch_size": 16, "lr": 1e-3}
    chosen |= {"holdout": ("elk",), "device": "cpu", "options": OPTIONS} | changes
    return heads.train(store, **chosen)


def test_training_leaves_the_blocks_as_the_backbone_has_them(made):
    report, _ = made
    record = read_run(Path(report.path)).record
    assert record["taps"] == ["block:1"]
    saved = safetensors.torch.load_file(Path(report.path) / "head.safetensors")
    stored = weights_of(plain_tail(3)).tensors
    ours = {name: value for name, value in saved.items() if name.startswith("head.tail.blocks.1.")}
    assert len(ours) == 12
    for name, value in ours.items():
        theirs = stored[name.removeprefix("head.tail.").replace("blocks.1.", "blocks.2.")]
        assert torch.equal(value, torch.from_numpy(theirs))
    tail = sum(v.numel() for n, v in saved.items() if n.startswith("head.tail.blocks."))
    assert tail == 2 * BLOCK_PARAMETERS
    model = load(read_run(Path(report.path)), device="cpu")
    assert report.parameters == model.head.n_parameters()
    assert sum(p.numel() for p in model.head.parameters()) == report.parameters + tail


@pytest.mark.parametrize("mode", ["token", "lora:where=tail", "token+prompts:where=both"])
def test_an_adaptation_in_the_blocks_is_saved_and_read_back(made, in_folder, mode):
    report, _ = made
    recipe = Recipe(mode=mode, steps=3)
    found = adapt(report.path, AdaptChoices(identity="elk", shots=2), recipe, device="cpu")
    one = found.tokens[0]
    assert one.loss_stored == pytest.approx(one.loss)
    assert one.loss < one.loss_before
    run = read_run(Path(report.path))
    model, saved = load(run, device="cpu"), read_token(one.path)
    use_token(model, run, saved)
    state = dict(model.head.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in saved.weights.items())
    measured = heads.evaluate(report.path, token=one.path, device="cpu")
    assert measured.metrics["rmse"] == pytest.approx(one.metrics["rmse"])


def test_what_cannot_be_is_said(made, tmp_path):
    _, folder = made
    head = build_head("identity_token", taps=[SHAPES[3]], n_outputs=6, options={"heads": 2})
    with pytest.raises(InvalidInputError, match=r"holds no blocks.*--set tail_blocks=1 .*--tail"):
        add_method(head, "lora:where=tail", generator=torch.Generator())
    with pytest.raises(InvalidInputError, match="one of decoder, tail, both"):
        add_method(head, "lora:where=block", generator=torch.Generator())
    bare = TailSpec(first=2, blocks=(BARE,) * 2, n_prefix=1)
    with pytest.raises(InvalidInputError, match="there are no biases here"):
        add_method(make_head(bare), "bitfit:where=tail", generator=torch.Generator())
    with pytest.raises(InvalidInputError, match="left out, as the options of the head choose"):
        train(folder / "s.zarr", taps=["block:3"])
    with pytest.raises(InvalidInputError, match="from 1 to 3"):
        train(folder / "s.zarr", options={**OPTIONS, "tail_blocks": 4})
    extract(tmp_path / "without.zarr")
    with pytest.raises(NotFoundError, match="--tail 2"):
        train(tmp_path / "without.zarr")


def test_its_numbers_are_told_apart(capsys):
    found = describe_head(
        "identity_token", width=768, grid=(16, 16), n_outputs=17, options={"tail_blocks": 2}
    )
    plain = describe_head("identity_token", width=768, grid=(16, 16), n_outputs=17)
    assert found["parameters"] == plain["parameters"] == 7_940_290
    assert found["frozen_parameters"] == 2 * (12 * 768 * 768 + 13 * 768)
    assert sum(found["parameters_by_part"].values()) == found["parameters"]
    assert found["taps"] == ["block:9"]
    assert found["forward_flops"] > plain["forward_flops"]
    words = "describe identity_token --width 768 --grid 16x16 --outputs 17"
    assert exit_code(program, words.split()) == 0
    assert "frozen" not in capsys.readouterr().out
    assert exit_code(program, [*words.split(), "--set", "tail_blocks=2"]) == 0
    assert "14,175,744 of the backbone" in capsys.readouterr().out


def test_a_protocol_compares_the_methods_in_both_places(made, tmp_path, capsys):
    _, folder = made
    words = "protocol identity --holdout elk --shots 1 --steps 1 --seeds 1 --lr-factors 1"
    words += " --tuning-seeds 1 --inits mean --train-steps 1 --batch-size 4 --device cpu --json"
    words += " --set heads=2 --set ff=8 --set checks=1 --set tail_blocks=1"
    args = [*words.split(), "--store", str(folder / "s.zarr"), "--runs", str(tmp_path)]
    assert exit_code(program, args) == 0
    found = json.loads(capsys.readouterr().out)
    lines = pq.read_table(tmp_path / found["run_id"] / "lines.parquet").to_pylist()
    counts = {line["mode"]: line["parameters"] for line in lines if line["shots"] == "1"}
    assert {f"{method}:where=tail" for method in METHODS} | set(METHODS) <= counts.keys()
    assert counts["ia3:where=tail"] == 6 * DIM
    assert counts["lora:where=tail"] == 4 * 8 * DIM


def test_the_modes_of_the_command_line_are_those_there_are():
    assert tuple(protocol_command.MODES.split(",")) == MODES
    assert {mode.partition(":")[0] for mode in protocol_command._TAIL_MODES} == METHODS.keys()


def test_options_of_a_mode_may_be_parted_by_commas():
    found = protocol_command.Modes().convert("token, lora:rank=4,where=tail,bitfit", None, None)
    assert found == ("token", "lora:rank=4,where=tail", "bitfit")

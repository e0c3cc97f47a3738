"""Ways to adapt a frozen decoder by few numbers, to compare a single token with.

Each freezes a head, adds modules of its own inside of the decoder's layers (or frees what is
there) and gives the parameters to train; `where=tail` does so in the backbone's last blocks, where
the head holds some, `where=both` in both. All begin as if nothing were added: the adapted head
gives the very same numbers until the first step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from featstore.errors import invalid, not_found
from heads.options import parse_options
from heads.peft_modules import (
    Beside,
    LowRank,
    LowRankRows,
    Prompted,
    PromptedBlock,
    ScaledInput,
    ScaledOutput,
    ScaledRows,
    uniform,
)
from heads.token_decoder import DecoderLayer
from heads.vit_block import VitBlock

DECODER, TAIL, BOTH = "decoder", "tail", "both"
PLACES = (DECODER, TAIL, BOTH)
_PROJECTIONS = ("query", "key", "value", "mix")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method(ABC):
    """A way to adapt; a subclass is a frozen dataclass of its options."""

    where: str = DECODER

    def __post_init__(self) -> None:
        if self.where not in PLACES:
            raise invalid("where", self.where, f"one of {', '.join(PLACES)}")

    @abstractmethod
    def add_to(self, layer: DecoderLayer, generator: torch.Generator) -> None:
        """Add modules to a layer whose parameters are frozen."""

    @abstractmethod
    def add_to_block(self, block: VitBlock, generator: torch.Generator) -> None:
        """Add modules to a backbone's block whose parameters are frozen."""

    def frees(self, name: str) -> bool:
        """Tell whether it trains a parameter of this name that is there already."""
        return False


def add_method(
    head: nn.Module, method: str, *, generator: torch.Generator
) -> dict[str, nn.Parameter]:
    """Freeze a head, in place, but for what a method adds to its decoder.

    Args:
        head: With `DecoderLayer` inside, such as the identity-token head.
        method: Its name, perhaps with options: "lora", "lora:rank=4,targets=query+mix".
        generator: Of the numbers that begin at random.

    Returns:
        What is to be trained, by its name among the parameters of the changed head.

    Raises:
        NotFoundError: No method or option has this name.
        InvalidInputError: An option is not acceptable, or the head has no decoder to adapt.
    """
    chosen = parse_method(method)
    layers = [layer for layer in head.modules() if isinstance(layer, DecoderLayer)]
    blocks = [block for block in head.modules() if isinstance(block, VitBlock)]
    if not layers:
        name = type(head).__name__
        raise invalid("head", name, f"one with a decoder for {method}", hint="Use identity_token.")
    if chosen.where != DECODER and not blocks:
        hint = "Train a head with --set tail_blocks=1 on features that keep a --tail."
        raise invalid("where", chosen.where, f"{DECODER}: this head holds no blocks", hint=hint)
    head.requires_grad_(False)
    for name, value in head.named_parameters():
        place = TAIL if name.startswith(f"{TAIL}.") else DECODER
        value.requires_grad_(chosen.where in (place, BOTH) and chosen.frees(name))
    for layer in layers if chosen.where != TAIL else ():
        chosen.add_to(layer, generator)
    for block in blocks if chosen.where != DECODER else ():
        chosen.add_to_block(block, generator)
    found = {name: value for name, value in head.named_parameters() if value.requires_grad}
    if not found:
        raise invalid("method", method, "one that trains something: there are no biases here")
    return found


def parse_method(text: str) -> Method:
    """Read ``NAME`` or ``NAME:option=value,...``.

    Raises:
        NotFoundError: No method or option has this name.
        InvalidInputError: An option is not acceptable.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise not_found("method", name, METHODS)
    given = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    method: Method = METHODS[name](**parse_options(METHODS[name], given))
    return method


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora(Method):
    """Add a product of two thin matrices to projections of both attentions.

    ``2 * rank * width`` parameters a target, attention and layer.

    Source:
        "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """

    rank: int = 8
    alpha: float = 16.0  # what is added counts alpha / rank times
    targets: str = "query+value"  # of query, key, value and mix

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        _check_count("rank", self.rank)
        if not 0 < self.alpha < math.inf:
            raise invalid("alpha", self.alpha, "a positive number")
        names = self.targets.split("+")
        if len(set(names)) < len(names) or not set(names) <= set(_PROJECTIONS):
            expected = f"some of {', '.join(_PROJECTIONS)}, each once, joined by +"
            raise invalid("targets", self.targets, expected)

    def add_to(self, layer: DecoderLayer, generator: torch.Generator) -> None:
        """Add the products."""
        for attention in (layer.own, layer.cross):
            for name in self.targets.split("+"):
                linear = attention.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                thin = LowRank(linear, self.rank, self._scale, generator)
                attention.register_module(name, thin)

    def add_to_block(self, block: VitBlock, generator: torch.Generator) -> None:
        """Add the products; queries, keys and values are one matrix there."""
        names, attention = self.targets.split("+"), block.attention
        rows = [n for n, name in enumerate(_PROJECTIONS[:3]) if name in names]
        if rows:
            attention.added = LowRankRows(
                attention.qkv, attention.widths, rows,
                rank=self.rank, scale=self._scale, generator=generator,
            )  # fmt: skip
        if "mix" in names:
            thin = LowRank(attention.proj, self.rank, self._scale, generator)
            attention.register_module("proj", thin)

    @property
    def _scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class BitFit(Method):
    """Train the biases that are there, those of norms and of the last layers too.

    ``12 * width + ff`` parameters a layer, and those of the head's perceptron.

    Source:
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
        Language-models", arXiv:2106.10199.
    """

    def add_to(self, layer: DecoderLayer, generator: torch.Generator) -> None:
        """Add nothing."""

    def add_to_block(self, block: VitBlock, generator: torch.Generator) -> None:
        """Add nothing."""

    def frees(self, name: str) -> bool:
        """Tell whether it is a bias."""
        return name.endswith("bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ia3(Method):
    """Scale keys and values of both attentions, and what is inside of the perceptron.

    ``4 * width + ff`` parameters a layer.

    Source:
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
        Learning", arXiv:2205.05638.
    """

    def add_to(self, layer: DecoderLayer, generator: torch.Generator) -> None:
        """Add scales that begin as ones."""
        for attention in (layer.own, layer.cross):
            attention.register_module("key", ScaledOutput(attention.key))
            attention.register_module("value", ScaledOutput(attention.value))
        last = layer.feed_forward[-1]
        assert isinstance(last, nn.Linear)
        layer.feed_forward[-1] = ScaledInput(last)

    def add_to_block(self, block: VitBlock, generator: torch.Generator) -> None:
        """Add scales; the heads of some backbones share keys, and then their scales."""
        n_queries, *n_others = block.attention.widths
        like = block.attention.qkv.weight
        block.attention.added = ScaledRows(like, n_fixed=n_queries, n_scaled=sum(n_others))
        block.mlp.register_module("fc2", ScaledInput(block.mlp.fc2))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptFormer(Method):
    """Add a narrow perceptron beside the perceptron of each layer.

    ``2 * width * bottleneck + bottleneck + width`` parameters a layer.

    Source:
        "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
        arXiv:2205.13535.
    """

    bottleneck: int = 64
    scale: float = 0.1

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        _check_count("bottleneck", self.bottleneck)
        if not 0 < self.scale < math.inf:
            raise invalid("scale", self.scale, "a positive number")

    def add_to(self, layer: DecoderLayer, generator: torch.Generator) -> None:
        """Add the narrow perceptron, whose last layer begins as zeros."""
        layer.register_module("feed_forward", self._beside(layer.feed_forward, layer, generator))

    def add_to_block(self, block: VitBlock, generator: torch.Generator) -> None:
        """Add the same beside the block's perceptron, before it is scaled."""
        block.register_module("mlp", self._beside(block.mlp, block, generator))

    def _beside(
        self, wide: nn.Module, layer: DecoderLayer | VitBlock, generator: torch.Generator
    ) -> Beside:
        like = next(wide.parameters())
        width = layer.spec.dim if isinstance(layer, VitBlock) else len(layer.norm_out.weight)
        return Beside(wide, uniform(self.bottleneck, width, generator).to(like), self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts(Method):
    """Let queries attend to prompts too, apart from the patches and counted by a gate a head.

    ``count * width + heads`` parameters a layer. Prompts among the patches would take attention
    from them and change every answer; the gates, which begin at 0, let the head begin as it was.

    Source:
        Gates: "LLaMA-Adapter", arXiv:2303.16199; prompts: "Visual Prompt Tuning",
        arXiv:2203.12119.
    """

    count: int = 8

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        _check_count("count", self.count)

    def add_to(self, layer: DecoderLayer, generator: torch.Generator) -> None:
        """Add the prompts, normal numbers of the size of normed patches."""
        prompts_pd = torch.randn(self.count, len(layer.norm_out.weight), generator=generator)
        layer.register_module("cross", Prompted(layer.cross, prompts_pd))

    def add_to_block(self, block: VitBlock, generator: torch.Generator) -> None:
        """Let all tokens of the block attend to such prompts."""
        prompts_pd = torch.randn(self.count, block.spec.dim, generator=generator)
        block.register_module("attention", PromptedBlock(block.attention, prompts_pd))


METHODS: Mapping[str, type[Method]] = {
    "lora": Lora,
    "bitfit": BitFit,
    "ia3": Ia3,
    "adaptformer": AdaptFormer,
    "prompts": Prompts,
}
"""Methods by name."""


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise invalid(name, value, "a positive number")

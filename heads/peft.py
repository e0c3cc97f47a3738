"""Ways to adapt a frozen decoder by few numbers, to compare a single token with.

Each freezes a head, adds modules of its own inside of the decoder's layers (or frees what is
there) and gives the parameters to train. All begin as if nothing were added: the adapted head
gives the very same numbers until the first step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import invalid, not_found
from heads.options import parse_options
from heads.token_decoder import Attention, DecoderLayer, Glance, Patches

_PROJECTIONS = ("query", "key", "value", "mix")


class Method(ABC):
    """A way to adapt; a subclass is a frozen dataclass of its options."""

    @abstractmethod
    def add_to(self, head: nn.Module, generator: torch.Generator) -> None:
        """Add modules to a head all of whose parameters are frozen, or free some that it has."""


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
    if not _layers(head):
        name = type(head).__name__
        raise invalid("head", name, f"one with a decoder for {method}", hint="Use identity_token.")
    head.requires_grad_(False)
    chosen.add_to(head, generator)
    return {name: value for name, value in head.named_parameters() if value.requires_grad}


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
        _check_count("rank", self.rank)
        if not 0 < self.alpha < math.inf:
            raise invalid("alpha", self.alpha, "a positive number")
        names = self.targets.split("+")
        if len(set(names)) < len(names) or not set(names) <= set(_PROJECTIONS):
            expected = f"some of {', '.join(_PROJECTIONS)}, each once, joined by +"
            raise invalid("targets", self.targets, expected)

    def add_to(self, head: nn.Module, generator: torch.Generator) -> None:
        """Add the products."""
        for attention in (part for layer in _layers(head) for part in (layer.own, layer.cross)):
            for name in self.targets.split("+"):
                linear = attention.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                thin = _LowRank(linear, self.rank, self.alpha / self.rank, generator)
                attention.register_module(name, thin)


@dataclass(frozen=True, kw_only=True, slots=True)
class BitFit(Method):
    """Train the biases that are there, those of norms and of the last layers too.

    ``12 * width + ff`` parameters a layer, and those of the head's perceptron.

    Source:
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
        Language-models", arXiv:2106.10199.
    """

    def add_to(self, head: nn.Module, generator: torch.Generator) -> None:
        """Let all biases learn."""
        for name, value in head.named_parameters():
            if name.rpartition(".")[2] == "bias":
                value.requires_grad_(True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ia3(Method):
    """Scale keys and values of both attentions, and what is inside of the perceptron.

    ``4 * width + ff`` parameters a layer.

    Source:
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
        Learning", arXiv:2205.05638.
    """

    def add_to(self, head: nn.Module, generator: torch.Generator) -> None:
        """Add scales that begin as ones."""
        for layer in _layers(head):
            for attention in (layer.own, layer.cross):
                attention.register_module("key", _ScaledOutput(attention.key))
                attention.register_module("value", _ScaledOutput(attention.value))
            last = layer.feed_forward[-1]
            assert isinstance(last, nn.Linear)
            layer.feed_forward[-1] = _ScaledInput(last)


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
        _check_count("bottleneck", self.bottleneck)
        if not 0 < self.scale < math.inf:
            raise invalid("scale", self.scale, "a positive number")

    def add_to(self, head: nn.Module, generator: torch.Generator) -> None:
        """Add the narrow perceptron, whose last layer begins as zeros."""
        for layer in _layers(head):
            like = layer.norm_out.weight
            down = _uniform(self.bottleneck, len(like), generator).to(like)
            narrow = _Beside(layer.feed_forward, down, self.scale)
            layer.register_module("feed_forward", narrow)


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
        _check_count("count", self.count)

    def add_to(self, head: nn.Module, generator: torch.Generator) -> None:
        """Add the prompts, normal numbers of the size of normed patches."""
        for layer in _layers(head):
            width = len(layer.norm_out.weight)
            prompts = torch.randn(self.count, width, generator=generator)
            layer.register_module("cross", _Prompted(layer.cross, prompts))


METHODS: Mapping[str, type[Method]] = {
    "lora": Lora,
    "bitfit": BitFit,
    "ia3": Ia3,
    "adaptformer": AdaptFormer,
    "prompts": Prompts,
}
"""Methods by name."""


def _layers(head: nn.Module) -> list[DecoderLayer]:
    return [layer for layer in head.modules() if isinstance(layer, DecoderLayer)]


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise invalid(name, value, "a positive number")


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix as `nn.Linear` begins."""
    reach = 1 / math.sqrt(columns)
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * reach


class _LowRank(nn.Module):
    """A linear map and, beside it, one through few channels."""

    def __init__(
        self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.linear, self._scale = linear, scale
        down = _uniform(rank, linear.in_features, generator).to(linear.weight)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """Add the two."""
        beside = functional.linear(functional.linear(tokens_btd, self.down), self.up)
        added: Tensor = self.linear(tokens_btd) + self._scale * beside
        return added


class _ScaledOutput(nn.Module):
    """A linear map whose every output is scaled."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones_like(linear.weight[:, 0]))

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """Scale what comes out."""
        scaled: Tensor = self.linear(tokens_btd) * self.scale
        return scaled


class _ScaledInput(nn.Module):
    """A linear map whose every input is scaled."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones_like(linear.weight[0]))

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """Scale what goes in."""
        mapped: Tensor = self.linear(tokens_btd * self.scale)
        return mapped


class _Beside(nn.Module):
    """A perceptron and, beside it, a narrow one."""

    def __init__(self, wide: nn.Module, down: Tensor, scale: float) -> None:
        super().__init__()
        self.wide, self._scale = wide, scale
        self.down = nn.Parameter(down)
        self.down_bias = nn.Parameter(torch.zeros_like(down[:, 0]))
        self.up = nn.Parameter(torch.zeros_like(down.T))
        self.up_bias = nn.Parameter(torch.zeros_like(down[0]))

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """Add the two."""
        narrow_btd = functional.linear(tokens_btd, self.down, self.down_bias).relu()
        narrow_btd = functional.linear(narrow_btd, self.up, self.up_bias)
        added: Tensor = self.wide(tokens_btd) + self._scale * narrow_btd
        return added


class _Prompted(nn.Module):
    """Attention to patches and a token, and through gates to prompts."""

    def __init__(self, attention: Attention, prompts_pd: Tensor) -> None:
        super().__init__()
        self.attention = attention
        like = attention.mix.weight
        self.prompts = nn.Parameter(prompts_pd.to(like))
        self.gate = nn.Parameter(like.new_zeros(attention.n_heads))

    def remember(self, memory_btd: Tensor, valid_bt: Tensor | None = None) -> Patches:
        """Project what is attended to, as before."""
        return self.attention.remember(memory_btd, valid_bt)

    def glance(self, query_bqd: Tensor, patches: Patches) -> Glance:
        """Attend to the patches, as before."""
        return self.attention.glance(query_bqd, patches)

    def gather(self, glance: Glance, token_bd: Tensor | None = None) -> Tensor:
        """Add what the queries see in the prompts."""
        key_hcp = self._split(self.attention.key(self.prompts)).mT
        value_hpc = self._split(self.attention.value(self.prompts))
        share_bhqp = (glance.query @ key_hcp).softmax(dim=3)
        seen_bhqc = self.gate[:, None, None] * (share_bhqp @ value_hpc)
        # The bias of the mixing is in what the attention gives.
        mixed = functional.linear(seen_bhqc.transpose(1, 2).flatten(2), self.attention.mix.weight)
        return self.attention.gather(glance, token_bd) + mixed

    def _split(self, mixed_pd: Tensor) -> Tensor:
        """Give (heads, prompts, channels)."""
        heads = len(self.gate)
        return mixed_pd.reshape(len(mixed_pd), heads, -1).transpose(0, 1)

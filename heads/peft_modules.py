"""The modules by which few numbers change a frozen layer: each begins as if it were not there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from heads import vit_block
from heads.token_decoder import Attention, Glance, Patches


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix as `nn.Linear` begins."""
    reach = 1 / math.sqrt(columns)
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * reach


class LowRank(nn.Module):
    """A linear map and, beside it, one through few channels."""

    def __init__(
        self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.linear, self._scale = linear, scale
        down = uniform(rank, linear.in_features, generator).to(linear.weight)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """Add the two."""
        beside = functional.linear(functional.linear(tokens_btd, self.down), self.up)
        added: Tensor = self.linear(tokens_btd) + self._scale * beside
        return added


class ScaledOutput(nn.Module):
    """A linear map whose every output is scaled."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones_like(linear.weight[:, 0]))

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """Scale what comes out."""
        scaled: Tensor = self.linear(tokens_btd) * self.scale
        return scaled


class ScaledInput(nn.Module):
    """A linear map whose every input is scaled."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones_like(linear.weight[0]))

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """Scale what goes in."""
        mapped: Tensor = self.linear(tokens_btd * self.scale)
        return mapped


class Beside(nn.Module):
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


class Prompted(nn.Module):
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


class LowRankRows(nn.Module):
    """Beside one linear map that gives several outputs, thin ones for some of these.

    Args:
        linear: What gives all outputs.
        widths: Of the outputs, in their order.
        targets: Numbers of those that get a thin map.
        rank: Channels of a thin map.
        scale: What is added counts so many times.
        generator: Of the numbers that begin at random.
    """

    def __init__(
        self,
        linear: nn.Linear,
        widths: Sequence[int],
        targets: Sequence[int],
        *,
        rank: int,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._widths, self._targets, self._scale = tuple(widths), tuple(targets), scale
        like = linear.weight
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for target in self._targets:
            self.down.append(nn.Parameter(uniform(rank, linear.in_features, generator).to(like)))
            self.up.append(nn.Parameter(like.new_zeros(widths[target], rank)))

    def forward(self, tokens_btd: Tensor, mixed_btm: Tensor) -> Tensor:
        """Add to (batch, tokens, sum of the widths) what the tokens give."""
        parts = list(torch.split(mixed_btm, list(self._widths), dim=2))
        for target, down, up in zip(self._targets, self.down, self.up, strict=True):
            thin = functional.linear(functional.linear(tokens_btd, down), up)
            parts[target] = parts[target] + self._scale * thin
        return torch.cat(parts, dim=2)


class ScaledRows(nn.Module):
    """Scales for the last outputs of one linear map, the keys and values of an attention."""

    def __init__(self, like: Tensor, *, n_fixed: int, n_scaled: int) -> None:
        super().__init__()
        self._n_fixed = n_fixed
        self.scale = nn.Parameter(like.new_ones(n_scaled))

    def forward(self, tokens_btd: Tensor, mixed_btm: Tensor) -> Tensor:
        """Scale (batch, tokens, fixed + scaled)."""
        fixed = self.scale.new_ones(self._n_fixed)
        return mixed_btm * torch.cat([fixed, self.scale])


class PromptedBlock(nn.Module):
    """The self-attention of a backbone's block, in which tokens attend to prompts too."""

    def __init__(self, attention: vit_block.Attention, prompts_pd: Tensor) -> None:
        super().__init__()
        self.attention = attention
        like = attention.qkv.weight
        self.prompts = nn.Parameter(prompts_pd.to(like))
        self.gate = nn.Parameter(like.new_zeros(attention.n_heads))

    def forward(self, tokens_btd: Tensor, rotation: vit_block.Rotation | None) -> Tensor:
        """Add what the tokens see in the prompts, which lie nowhere: neither is turned."""
        query, _, _ = self.attention.heads(tokens_btd)
        _, key, value = self.attention.heads(self.prompts[None])
        key, value = (one.expand(len(query), -1, -1, -1) for one in (key.to(value.dtype), value))
        scale = self.attention.scale
        seen_bhtc = functional.scaled_dot_product_attention(
            query.to(value.dtype), key, value, scale=scale
        )
        attended_bhtc = self.attention.attend(tokens_btd, rotation)
        return self.attention.join(attended_bhtc + self.gate[:, None, None] * seen_bhtc)

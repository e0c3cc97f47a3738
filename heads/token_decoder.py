"""A transformer decoder whose memory is the patches of an image and one token beside them.

What the patches alone decide is computed once and then shared by any number of tokens: attention
over patches and a token is attention over the patches, mixed with the token's value by a sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heads.blocks import minus_infinity_outside


@dataclass(frozen=True, kw_only=True, slots=True)
class Patches:
    """Keys and values of the patches of some images in one layer."""

    key: Tensor  # (batch, heads, channels, tokens)
    value: Tensor  # (batch, heads, tokens, channels)
    outside: Tensor | None  # (batch, tokens): 0, or minus infinity where padded

    def rows(self, index: Tensor) -> Patches:
        """Give some of the images, perhaps several times."""
        outside = None if self.outside is None else self.outside[index]
        return Patches(key=self.key[index], value=self.value[index], outside=outside)


@dataclass(frozen=True, kw_only=True, slots=True)
class Glance:
    """What the queries of one layer saw in the patches, before any token is known."""

    query: Tensor  # (batch or 1, heads, queries, channels), scaled
    seen: Tensor  # (batch, heads, queries, channels)
    mass: Tensor  # (batch, heads, queries): log of the sum of the exponents of the scores

    def rows(self, index: Tensor) -> Glance:
        """Give some of the images, perhaps several times."""
        query = self.query if len(self.query) == 1 else self.query[index]
        return Glance(query=query, seen=self.seen[index], mass=self.mass[index])


class Attention(nn.Module):
    """Attention of several heads, its four projections apart.

    ``4 * width * (width + 1)`` parameters; they begin as those of `nn.MultiheadAttention`.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        for projection in (self.query, self.key, self.value):
            # torch draws the three as one matrix, three times as high.
            nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))
        for projection in (self.query, self.key, self.value, self.mix):
            nn.init.zeros_(projection.bias)

    def remember(self, memory_btd: Tensor, valid_bt: Tensor | None = None) -> Patches:
        """Project what is attended to."""
        return Patches(
            key=self._split(self.key(memory_btd)).mT,
            value=self._split(self.value(memory_btd)),
            outside=minus_infinity_outside(valid_bt),
        )

    def glance(self, query_bqd: Tensor, patches: Patches) -> Glance:
        """Attend to the patches.

        Args:
            query_bqd: (batch, queries, width), or of a batch of 1 where all images are asked the
                same.
            patches: What is attended to.
        """
        query_bhqc = self._split(self.query(query_bqd))
        query_bhqc = query_bhqc * (1 / math.sqrt(query_bhqc.shape[3]))
        scores_bhqt = query_bhqc @ patches.key
        if patches.outside is not None:
            scores_bhqt = scores_bhqt + patches.outside[:, None, None]
        mass_bhq = scores_bhqt.logsumexp(dim=3)
        seen_bhqc = (scores_bhqt - mass_bhq[..., None]).exp() @ patches.value
        return Glance(query=query_bhqc, seen=seen_bhqc, mass=mass_bhq)

    def gather(self, glance: Glance, token_bd: Tensor | None = None) -> Tensor:
        """Give (batch, queries, width): what was seen, a token beside the patches included."""
        seen_bhqc = glance.seen
        if token_bd is not None:
            key_bhc1 = self._split(self.key(token_bd)[:, None]).mT
            value_bh1c = self._split(self.value(token_bd)[:, None])
            score_bhq = (glance.query @ key_bhc1)[..., 0]
            share_bhq1 = torch.sigmoid(score_bhq - glance.mass)[..., None]
            seen_bhqc = seen_bhqc + share_bhq1 * (value_bh1c - seen_bhqc)
        gathered: Tensor = self.mix(seen_bhqc.transpose(1, 2).flatten(2))
        return gathered

    def forward(self, tokens_btd: Tensor) -> Tensor:
        """Let tokens attend to each other."""
        return self.gather(self.glance(tokens_btd, self.remember(tokens_btd)))

    def _split(self, mixed_btd: Tensor) -> Tensor:
        """Give (batch, heads, tokens, channels)."""
        split: Tensor = mixed_btd.unflatten(2, (self.n_heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        return split


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to patches and a token, then a perceptron follows.

    It gives the numbers of `nn.TransformerDecoderLayer` with its defaults and no dropout: a norm
    after each sum, ReLU. ``8 * width * (width + 1) + (2 * width + 1) * ff + 7 * width``
    parameters.
    """

    def __init__(self, width: int, *, n_heads: int, ff: int) -> None:
        super().__init__()
        self.own = Attention(width, n_heads)
        self.cross = Attention(width, n_heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, ff), nn.ReLU(), nn.Linear(ff, width))
        self.norm_own = nn.LayerNorm(width)
        self.norm_cross = nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)

    def confer(self, query_bqd: Tensor) -> Tensor:
        """Let the queries attend to each other."""
        conferred: Tensor = self.norm_own(query_bqd + self.own(query_bqd))
        return conferred

    def conclude(self, query_bqd: Tensor, glance: Glance, token_bd: Tensor | None) -> Tensor:
        """Take in what the queries saw, and the token."""
        seen_bqd = self.norm_cross(query_bqd + self.cross.gather(glance, token_bd))
        concluded: Tensor = self.norm_out(seen_bqd + self.feed_forward(seen_bqd))
        return concluded


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What some images show the decoder, whatever the token: patches and a first glance.

    Neither holds where the token changes the patches or the queries themselves.
    """

    patches: Sequence[Patches]  # one a layer; after a glance, one a further layer
    query: Tensor | None = None  # (1, queries, width) after they conferred in the first layer
    glance: Glance | None = None  # of the first layer

    def tensors(self) -> Iterator[Tensor]:
        """Go through all numbers."""
        for patches in self.patches:
            yield from (patches.key, patches.value)
        if self.query is not None:
            yield self.query
        if self.glance is not None:
            yield from (self.glance.query, self.glance.seen, self.glance.mass)

    def rows(self, index: Tensor) -> Seen:
        """Give some of the images, perhaps several times."""
        return Seen(
            patches=[each.rows(index) for each in self.patches],
            query=self.query,
            glance=None if self.glance is None else self.glance.rows(index),
        )


def joined(parts: Sequence[Seen]) -> Seen:
    """Lay what some batches of images show one after another."""
    if len(parts) == 1:
        return parts[0]
    layers = zip(*(part.patches for part in parts), strict=True)
    glances = [part.glance for part in parts if part.glance is not None]
    return Seen(
        patches=[
            Patches(
                key=torch.cat([each.key for each in layer]),
                value=torch.cat([each.value for each in layer]),
                outside=_joined_outside(layer),
            )
            for layer in layers
        ],
        query=parts[0].query,
        glance=None
        if not glances
        else Glance(
            query=glances[0].query,
            seen=torch.cat([glance.seen for glance in glances]),
            mass=torch.cat([glance.mass for glance in glances]),
        ),
    )


def _joined_outside(layer: Sequence[Patches]) -> Tensor | None:
    """Some batches have padding, others none: then theirs is all inside."""
    if all(each.outside is None for each in layer):
        return None
    return torch.cat(
        [each.value.new_zeros(len(each.value), each.value.shape[2]) if each.outside is None
         else each.outside for each in layer]
    )  # fmt: skip


class TokenDecoder(nn.Module):
    """Layers that ask the patches of an image, and a token beside them, the same questions."""

    def __init__(self, width: int, *, n_layers: int, n_heads: int, ff: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, n_heads=n_heads, ff=ff) for _ in range(n_layers)
        )

    def _each(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def remember(self, memory_btd: Tensor, valid_bt: Tensor | None) -> Seen:
        """Project the patches for every layer: the part that takes longest."""
        patches = [layer.cross.remember(memory_btd, valid_bt) for layer in self._each()]
        return Seen(patches=patches)

    def glance(self, query_bqd: Tensor, seen: Seen) -> Seen:
        """Let queries look at the patches in the first layer."""
        first = self._each()[0]
        query_bqd = first.confer(query_bqd)
        glance = first.cross.glance(query_bqd, seen.patches[0])
        return Seen(patches=seen.patches[1:], query=query_bqd, glance=glance)

    def forward(self, seen: Seen, token_bd: Tensor | None) -> Tensor:
        """Give (batch, queries, width) of what `glance` gave, and a token an image.

        Args:
            seen: What the queries saw.
            token_bd: (batch, width), or None where the memory has no token.
        """
        assert seen.query is not None
        assert seen.glance is not None
        first, *others = self._each()
        answer_bqd = first.conclude(seen.query, seen.glance, token_bd)
        for layer, patches in zip(others, seen.patches, strict=True):
            query_bqd = layer.confer(answer_bqd)
            glance = layer.cross.glance(query_bqd, patches)
            answer_bqd = layer.conclude(query_bqd, glance, token_bd)
        return answer_bqd

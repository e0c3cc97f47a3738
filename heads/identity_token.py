"""Identity tokens: a decoder that asks the patches of an image where each keypoint is.

One token stands for who is to be seen (a species, an individual) and lies among the patches that
the decoder reads. A new identity is learned as one new token, everything else staying as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featstore.errors import invalid
from featstore.tail import TailSpec, TailWeights
from featstore.types import TapShape
from heads.base import HEADS, Head, LearnableTask, TapTokens, check_inputs, only_dense_tap
from heads.blocks import position_encoding
from heads.copied_blocks import checked_tail, fill, final_tokens, tap_before
from heads.identity_options import FILM, MEMORY, RELATIVE, IdentityTokenOptions
from heads.joining import join, joined_shape
from heads.token_decoder import Seen, TokenDecoder
from heads.vit_block import Tail

N_RANDOM = 32  # tokens whose answers are compared
_SPREAD_IMAGES = 8  # images on which they are, at most
_NOT_MEASURED = -1.0


@HEADS.register("identity_token.v1")
class IdentityToken(Head):
    """Ask patches and an identity token for keypoints: one query a keypoint, a small perceptron.

    With the defaults, ``8 * width * (width + 1) + (2 * width + 1) * 2048 + 7 * width`` parameters
    of the decoder, ``width`` a keypoint, and ``(width + 1) * 64 + 65 * 2``; and ``width`` for
    every identity that was trained. Several taps count with their widths together. A frozen tail
    is the backbone's and counts nothing.

    The output is (x0, y0, x1, y1, ...), then a number a keypoint where there are scales. Without
    an identity it answers with the mean of the trained tokens, or the token of `set_token`.

    Inferred, as the abstract leaves it open: the decoder's layout; tokens and queries begin as
    normal numbers of the size of normed patches; there is no dropout.

    Source:
        "Token-Only Adaptation of Frozen Self-Supervised Vision Foundation Models for Cross-Species
        Animal Pose" (abstract); HEADS.md 3.1.
    """

    OPTIONS = IdentityTokenOptions
    LR = 1e-4
    is_pooled = True

    token_std: Tensor  # buffer: what `diagnose` measured last

    def __init__(
        self,
        *,
        taps: Sequence[TapShape],
        n_outputs: int,
        tail: TailSpec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = IdentityTokenOptions(**options)
        shape = joined_shape(taps, head="identity_token")
        assert shape.grid is not None
        self._widths, self._rows = tuple(tap.dim for tap in taps), shape.grid[0]
        self.width = width = shape.dim
        self.n_keypoints = _keypoints(n_outputs, chosen)
        _check_width(width, chosen)
        names = chosen.identities
        self.tokens = nn.Parameter(torch.randn(len(names), width)) if names else None
        self.queries = nn.Parameter(torch.randn(self.n_keypoints, width))
        self.token_proj = nn.Linear(width, width) if chosen.token_proj else None
        self.film = nn.Linear(width, 2 * width) if chosen.injection != MEMORY else None
        if self.film is not None:  # begins as if there were no token
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)
        self.decoder = TokenDecoder(
            width, n_layers=chosen.layers, n_heads=chosen.heads, ff=chosen.ff
        )
        self.project = nn.Sequential(
            nn.Linear(width, chosen.hidden), nn.GELU(), nn.Linear(chosen.hidden, chosen.numbers)
        )
        self.register_buffer("token_std", torch.tensor(_NOT_MEASURED))
        self._token: Tensor | None = None
        self.tail: Tail | None = None
        if chosen.tail_blocks:
            tap = only_dense_tap(taps, head="identity_token with a tail")
            self.tail = Tail(checked_tail(tail, tap, chosen.tail_blocks, option="tail_blocks"))
            self.tail.requires_grad_(False)

    @classmethod
    def n_numbers(cls, options: Mapping[str, Any]) -> int:
        """Count the numbers of a keypoint."""
        return int(options["numbers"])

    @classmethod
    def with_identities(
        cls, options: Mapping[str, Any], identities: Sequence[str], *, numbers: int = 1
    ) -> dict[str, Any]:
        """Give every identity a token, and every keypoint its numbers.

        Raises:
            InvalidInputError: The options name other identities, or a name has a "|".
        """
        found = "|".join(identities)
        if any("|" in name for name in identities):
            raise invalid("identities", found, "names without |")
        if options["tokens"] not in ("", found):
            hint = "Leave tokens out."
            raise invalid("tokens", options["tokens"], f"{found!r}, as trained", hint=hint)
        filled = {**options, "tokens": found}
        return filled if numbers == 1 else {**filled, "numbers": numbers}

    @classmethod
    def n_tail_blocks(cls, options: Mapping[str, Any]) -> int:
        """Give `tail_blocks`."""
        return int(options.get("tail_blocks", 0))  # runs of before know of none

    @classmethod
    def asked_taps(cls, options: Mapping[str, Any], *, depth: int | None) -> tuple[str, ...] | None:
        """Leave no choice where there is a tail: it reads the tap before it."""
        return () if cls.n_tail_blocks(options) else None

    @classmethod
    def added_taps(cls, options: Mapping[str, Any], *, depth: int | None) -> tuple[str, ...]:
        """Give the tap that the tail reads.

        Raises:
            InvalidInputError: The backbone has no blocks, or not as many.
        """
        n_blocks, hint = cls.n_tail_blocks(options), "Leave out --set tail_blocks."
        if not n_blocks:
            return ()
        return (
            tap_before(
                n_blocks, depth=depth, head="identity_token", option="tail_blocks", hint=hint
            ),
        )

    def fill_tail(self, weights: TailWeights) -> None:
        """Take the backbone's own blocks."""
        assert self.tail is not None
        fill(self.tail, weights)

    @property
    def raw_inputs(self) -> frozenset[int]:
        """Number the tap of the tail."""
        return frozenset() if self.tail is None else frozenset({0})

    def n_parameters(self) -> int:
        """Count what is trained, so without a tail."""
        frozen = () if self.tail is None else self.tail.parameters()
        return super().n_parameters() - sum(parameter.numel() for parameter in frozen)

    def lr_scales(self) -> Mapping[str, float]:
        """Let the tokens learn a hundred times as fast."""
        return {"tokens": 100.0}

    @property
    def output_hw(self) -> tuple[int, int]:
        """One answer."""
        return (1, 1)

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the bias of the last layer."""
        return (self.project[-1].get_parameter("bias"),)

    def forward(self, inputs: Sequence[TapTokens], identity: Tensor | None = None) -> Tensor:
        """Give (batch, n_outputs, 1, 1).

        Args:
            inputs: One a tap.
            identity: (batch,) numbers of identities; -1, or None for all: whoever `set_token`
                set, else the mean.
        """
        return self.answer(self.see(inputs), self.tokens_of(identity, inputs[0].patch.shape[0]))

    def set_token(self, token_d: Tensor | None) -> None:
        """Answer for the identity of this token from now on; None: for the mean of the trained.

        Raises:
            InvalidInputError: It is of another width, or not finite.
        """
        if token_d is None:
            self._token = None
            return
        if token_d.shape != (self.width,) or not bool(torch.isfinite(token_d).all()):
            given = tuple(token_d.shape)
            raise invalid("token", given, f"{self.width} finite numbers, as wide as the head")
        self._token = token_d.detach().to(self.queries)

    def mean_token(self) -> Tensor:
        """Give (width,): the mean of the trained tokens; zeros where none were."""
        return self.queries.new_zeros(self.width) if self.tokens is None else self.tokens.mean(0)

    def tokens_of(self, identity: Tensor | None, batch: int) -> Tensor:
        """Give (batch, width): the tokens of identities by their numbers, see `forward`."""
        other_d = self.mean_token() if self._token is None else self._token
        if identity is None or self.tokens is None:
            return other_d.expand(batch, -1)
        table_nd = torch.cat([self.tokens, other_d[None]])
        return table_nd[torch.where(identity < 0, len(self.tokens), identity)]

    def random_tokens(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count, width) normal numbers, around 0, of the size of the trained tokens."""
        noise_nd = torch.randn(count, self.width, generator=generator).to(self.queries)
        if self.tokens is None:
            return noise_nd
        return noise_nd * self.tokens.detach().square().mean().sqrt()

    def remember(self, inputs: Sequence[TapTokens]) -> Seen | TapTokens:
        """Give what the decoder keeps of images: keys and values, or patches that film changes."""
        check_inputs(inputs, self._widths)
        if self.tail is None:
            tokens = join(inputs, self.queries.dtype)
        else:
            tokens = final_tokens(self.tail, inputs[0])
        if self.options.injection == FILM:
            return tokens
        return self.decoder.remember(self._with_positions(tokens), tokens.valid)

    def see(self, inputs: Sequence[TapTokens]) -> Seen | TapTokens:
        """Do everything that no token changes: `answer` does the rest for any tokens."""
        return self.glance(self.remember(inputs))

    def glance(self, memory: Seen | TapTokens) -> Seen | TapTokens:
        """Let the queries look at what `remember` gave, where no token changes them."""
        if isinstance(memory, TapTokens) or self.options.injection != MEMORY:
            return memory
        return self.decoder.glance(self.queries[None], memory)

    def answer(self, seen: Seen | TapTokens, token_bd: Tensor) -> Tensor:
        """Give (batch, n_outputs, 1, 1) for what `see` gave and a token an image."""
        if self.token_proj is not None:
            token_bd = self.token_proj(token_bd)
        queries_bqd = self.queries[None]
        if self.film is not None:
            scale_b1d, shift_b1d = self.film(token_bd)[:, None].chunk(2, dim=2)
            if isinstance(seen, TapTokens):
                memory_btd = self._with_positions(seen, 1 + scale_b1d, shift_b1d)
                seen = self.decoder.remember(memory_btd, seen.valid)
            else:
                queries_bqd = queries_bqd * (1 + scale_b1d) + shift_b1d
            seen = self.decoder.glance(queries_bqd, seen)
        assert isinstance(seen, Seen)
        asked_bqd = self.decoder(seen, None if self.film is not None else token_bd)
        numbers_bqn = self.project(asked_bqd)
        # All places first, then all scales: what follows reads places without knowing of scales.
        parts = (numbers_bqn[..., :2].flatten(1), numbers_bqn[..., 2:].flatten(1))
        return torch.cat(parts, dim=1)[:, :, None, None]

    def _with_positions(self, tokens: TapTokens, scale: Any = 1.0, shift: Any = 0.0) -> Tensor:
        patch_btd = tokens.filled(self.queries.dtype) * scale + shift
        if self.options.positions == "none":
            return patch_btd
        step = self._rows / tokens.grid[0]  # on a finer grid the frame stays as large
        like = self.queries.detach()
        return patch_btd + position_encoding(tokens.grid, dim=self.width, step=step, like=like)

    def output_for(self, inputs: Sequence[TapTokens], targets: Mapping[str, Tensor]) -> Tensor:
        """Answer with the token of the identity that each image is of, where it was trained."""
        return self(inputs, targets.get("identity"))

    def learn(
        self, inputs: Sequence[TapTokens], targets: Mapping[str, Tensor], task: LearnableTask
    ) -> Tensor:
        """Give the loss with own tokens, and the margin to that with others."""
        identity, chosen = targets.get("identity"), self.options
        seen = self.see(inputs)
        output = self.answer(seen, self.tokens_of(identity, inputs[0].patch.shape[0]))
        loss = task.loss(output, targets)
        if identity is None or self.tokens is None or not chosen.margin_weight:
            return loss
        own_b = task.losses(output, targets)
        wrong_b = task.losses(self.answer(seen, self._wrong_tokens(identity)), targets)
        unit = own_b.detach().abs() if chosen.margin_unit == RELATIVE else 1.0
        lacking_b = (chosen.margin * unit + own_b - wrong_b).relu()
        is_known = (identity >= 0).to(lacking_b)
        lacking = (lacking_b * is_known).sum() / is_known.sum().clamp(min=1)
        return loss + chosen.margin_weight * lacking

    def _wrong_tokens(self, identity: Tensor) -> Tensor:
        """Draw another token for each image: the mean, or one of another identity of the batch."""
        other_b = draw_other(identity)
        is_mean = torch.rand(len(identity), device=identity.device) < 0.5
        return self.tokens_of(torch.where(is_mean, -1, other_b), len(identity))

    @torch.no_grad()
    def diagnose(self, inputs: Sequence[TapTokens]) -> dict[str, float]:
        """Measure how far the places move when the token is replaced by random ones.

        Returns:
            ``token_std``: the standard deviation over random tokens, a mean over coordinates and
            the first images; near 0, the head does not listen to its token.
        """
        patch = inputs[0].patch
        few = torch.arange(min(len(patch), _SPREAD_IMAGES), device=patch.device)
        first = [tokens.rows(few) for tokens in inputs]
        random_nd = self.random_tokens(N_RANDOM, torch.Generator().manual_seed(0))
        seen, batch = self.see(first), first[0].patch.shape[0]
        answers = [self.answer(seen, token.expand(batch, -1)) for token in random_nd]
        places_nbc = torch.stack(answers)[:, :, : 2 * self.n_keypoints, 0, 0]
        self.token_std.fill_(float(places_nbc.std(dim=0).mean()))
        return {"token_std": float(self.token_std)}

    def learned(self) -> dict[str, Any]:
        """Tell the spread over random tokens, and what the tokens add to the parameters."""
        n_token = 0 if self.tokens is None else self.tokens.numel()
        spread = float(self.token_std)
        return {
            **({} if spread == _NOT_MEASURED else {"token_std": spread}),
            "token_parameters": n_token,
            "decoder_parameters": self.n_parameters() - n_token,
        }


def draw_other(identity: Tensor) -> Tensor:
    """Draw for each image, evenly, an image of another known identity in the batch.

    Args:
        identity: (batch,) numbers; -1 is nobody.

    Returns:
        (batch,) numbers of their identities; -1 where all are of one.
    """
    is_other = (identity[:, None] != identity[None]) & (identity[None] >= 0)
    order_bb = torch.rand(is_other.shape, device=identity.device).masked_fill(~is_other, -1.0)
    best_b, index_b = order_bb.max(dim=1)
    return torch.where(best_b < 0, -1, identity[index_b])


def _keypoints(n_outputs: int, options: IdentityTokenOptions) -> int:
    if n_outputs % options.numbers:
        expected = f"a multiple of {options.numbers}, the numbers of a keypoint"
        raise invalid("n_outputs", n_outputs, expected, hint="Use the task pose.")
    return n_outputs // options.numbers


def _check_width(width: int, options: IdentityTokenOptions) -> None:
    if width % options.heads:
        raise invalid("heads", options.heads, f"a divisor of the width {width}")
    if options.positions == "sincos" and width % 4:
        hint = "Use --set positions=none."
        raise invalid("positions", options.positions, f"none for the width {width}", hint=hint)

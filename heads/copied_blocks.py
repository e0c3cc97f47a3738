"""What heads share that hold copies of a backbone's last blocks: these read one tap, raw."""

from __future__ import annotations

import torch
from torch import nn

from featstore.errors import InvalidInputError, invalid
from featstore.tail import TailSpec, TailWeights
from featstore.types import TapShape
from heads.base import TapTokens
from heads.vit_block import Tail


def tap_before(n_blocks: int, *, depth: int | None, head: str, option: str, hint: str) -> str:
    """Name the tap that the last blocks read.

    Args:
        n_blocks: How many last blocks, at least 1.
        depth: Blocks of the backbone; None where it has none, or nobody knows.
        head: Name of the head, for the message.
        option: Name of its option that counts the blocks.
        hint: What to do with a backbone that has no blocks.

    Raises:
        InvalidInputError: The backbone has no blocks, or not as many.
    """
    if depth is None:
        raise InvalidInputError(
            f"The head {head} copies the last blocks of a ViT, and these features come from a net "
            f"of stages or were imported. {hint}"
        )
    if n_blocks >= depth:
        raise invalid(option, n_blocks, f"from 1 to {depth - 1}, as the backbone has {depth}")
    return f"block:{depth - n_blocks - 1}"


def checked_tail(tail: TailSpec | None, tap: TapShape, n_blocks: int, *, option: str) -> TailSpec:
    """Refuse a tail of other blocks than the tap and the options say.

    Raises:
        InvalidInputError: There is none, or it is of other blocks.
    """
    wanted = (tap.tap, n_blocks, tap.dim, tap.n_prefix)
    given = None if tail is None else (tail.input_tap, tail.n_blocks, tail.dim, tail.n_prefix)
    if tail is None or given != wanted:
        expected = f"the blocks after the last tap, with its width and prefix tokens: {wanted}"
        raise invalid("tail", given, expected, hint=f"Choose another --set {option}.")
    return tail


def final_tokens(tail: Tail, tokens: TapTokens) -> TapTokens:
    """Give what copied blocks make of their tap: patch tokens, normed, with the same padding.

    Padded tokens are read as the backbone read them.

    Raises:
        InvalidInputError: The tap lacks its prefix tokens.
    """
    n_prefix = tail.spec.n_prefix
    given = 0 if tokens.prefix is None else tokens.prefix.shape[1]
    if given != n_prefix:
        raise invalid("prefix tokens", given, f"the {n_prefix} that the copied blocks read")
    parts = [tokens.patch] if tokens.prefix is None else [tokens.prefix, tokens.patch]
    final_btd = tail(torch.cat(parts, dim=1), tokens.grid)[:, n_prefix:]
    return TapTokens(patch=final_btd, grid=tokens.grid, valid=tokens.valid)


def fill(tail: nn.Module, weights: TailWeights) -> None:
    """Give copied blocks the backbone's own weights."""
    tensors = {name: torch.from_numpy(array) for name, array in weights.tensors.items()}
    tail.load_state_dict(tensors)

"""Pieces that dense heads share: position encoding, locality mask, masked attention, up-scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from featstore.errors import invalid
from heads.base import TapTokens

POSITION_DIM = 8
MASK_FORMS = ("code", "paper")
MIN_SIGMA = 1e-3
_GPU_BUFFER_BYTES = 1 << 28


def position_encoding(
    grid: tuple[int, int],
    *,
    dim: int = POSITION_DIM,
    step: float = 1.0,
    like: Tensor | None = None,
) -> Tensor:
    """Encode the positions of a grid, one half of the channels for x and then one for y.

    In 8 channels each coordinate p gives ``[sin p, sin 0.01 p, cos p, cos 0.01 p]``; in 16 the
    factors are 1, 0.1, 0.01 and 0.001.

    Args:
        grid: Rows and columns.
        dim: Channels, a multiple of 4.
        step: From one position to the next.
        like: A tensor whose device and dtype to take; without it, float32 on the processor.

    Returns:
        (rows * columns, dim), row-major.

    Source:
        HEADS.md 1.2, item 2: sinusoidal encoding, temperature 1e4, of the released DeAP.
    """
    like = torch.empty(0) if like is None else like
    y_yc, x_xc = (
        _encode(torch.arange(n, device=like.device, dtype=like.dtype) * step, dim) for n in grid
    )
    full = (*grid, dim // 2)
    both = torch.cat([x_xc[None].expand(full), y_yc[:, None].expand(full)], dim=-1)
    return both.reshape(-1, dim)


def _encode(positions: Tensor, dim: int) -> Tensor:
    n_factors = dim // 4
    factors = [1e4 ** (-k / n_factors) for k in range(n_factors)]
    angles = positions[:, None] * positions.new_tensor(factors)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def squared_distances(
    from_grid: tuple[int, int], to_grid: tuple[int, int], *, like: Tensor | None = None
) -> Tensor:
    """Give squared distances between the points of two grids laid over the same unit square.

    The corners of both grids lie in the corners of the square (``linspace(0, 1, n)`` an axis), so
    a distance of 1 is a whole side of the frame, whatever its number of tokens. An axis of one
    token lies at 0.

    Args:
        from_grid: Rows and columns of the one.
        to_grid: Rows and columns of the other.
        like: A tensor whose device and dtype to take; without it, float32 on the processor.

    Returns:
        (points of `from_grid`, points of `to_grid`), both row-major.
    """
    like = torch.empty(0) if like is None else like
    dy = _axis_distances(from_grid[0], to_grid[0], like)
    dx = _axis_distances(from_grid[1], to_grid[1], like)
    both = dy[:, None, :, None] + dx[None, :, None, :]
    return both.reshape(math.prod(from_grid), math.prod(to_grid))


def _axis_distances(n_from: int, n_to: int, like: Tensor) -> Tensor:
    start, end = (
        torch.linspace(0, 1, n, device=like.device, dtype=like.dtype) for n in (n_from, n_to)
    )
    return (start[:, None] - end[None]).square()


class LocalityMask(nn.Module):
    """A bump over distance for each attention head, added to its logits; a parameter a head.

    With `is_shared` all heads share one.

    ``paper``: exp(-d^2 / 2 s^2) / (s sqrt(2 pi)), d the distance. ``code``: the released program
    squares the squared distance again, exp(-d^4 / 2 s^2) / (s sqrt(2 pi)), which at the start is
    a flat disk of radius about 0.2 instead of a sharp peak.

    Sigma is used as max(sigma, 1e-3). The release has no bound, and 50 steps of Adam at 1e-3 can
    carry sigma through zero, where the mask changes sign. The gradient passes the bound as if it
    were not there, so that a sigma below it can come back.

    Source:
        Paper: Lueddecke & Ecker, TMLR 2025, equation 2. Code: HEADS.md 1.3.
    """

    def __init__(
        self, *, n_heads: int, form: str, start: float = 0.05, is_shared: bool = False
    ) -> None:
        super().__init__()
        if form not in MASK_FORMS:
            raise invalid("mask_form", form, f"one of {', '.join(MASK_FORMS)}")
        self.sigma = nn.Parameter(torch.full((1 if is_shared else n_heads,), start))
        self._n_heads, self._form = n_heads, form

    def positive_sigma(self) -> Tensor:
        """Give the (heads,) widths in use, in sides of the frame."""
        bound = MIN_SIGMA + (self.sigma - self.sigma.detach())
        return torch.where(self.sigma < MIN_SIGMA, bound, self.sigma)

    def forward(self, squared_qt: Tensor) -> Tensor:
        """Give (heads, queries, tokens) logits for squared distances (queries, tokens)."""
        sigma = self.positive_sigma().expand(self._n_heads)[:, None, None]
        falling = squared_qt.square() if self._form == "code" else squared_qt
        peak = 1 / (sigma * math.sqrt(2 * math.pi))
        return peak * torch.exp(falling * (-0.5 / sigma.square()))


def masked_attention(
    query_hqc: Tensor,
    key_bhct: Tensor,
    value_bhvt: Tensor,
    mask_hqt: Tensor,
    bias_bt: Tensor | None,
) -> Tensor:
    """Attend from queries that are the same for all images, with logits added to each score.

    ``softmax(query @ key + mask + bias) @ value`` without ever holding the scores of the whole
    batch: they are made image by image in buffers that stay in the processor's cache, and made
    again in the backward pass. The scores of a batch of 16 at 28 x 28 queries would be 100 MB.
    While a graph is traced (`torch.export`) it is `plain_masked_attention`.

    Args:
        query_hqc: (heads, queries, channels), already scaled by 1 / sqrt(channels).
        key_bhct: (batch, heads, channels, tokens).
        value_bhvt: (batch, heads, value channels, tokens).
        mask_hqt: (heads, queries, tokens), for example from `LocalityMask`.
        bias_bt: (batch, tokens): 0, or -inf for a token that must not be read. No gradient.

    Returns:
        (batch, heads, value channels, queries).
    """
    dtype = mask_hqt.dtype
    inputs = (query_hqc.to(dtype), key_bhct.to(dtype), value_bhvt.to(dtype), mask_hqt, bias_bt)
    if torch.compiler.is_compiling():
        return plain_masked_attention(*inputs)
    with torch.autocast(mask_hqt.device.type, enabled=False):
        attended: Tensor = _MaskedAttention.apply(*inputs)
    return attended


def plain_masked_attention(
    query_hqc: Tensor,
    key_bhct: Tensor,
    value_bhvt: Tensor,
    mask_hqt: Tensor,
    bias_bt: Tensor | None,
) -> Tensor:
    """Give what `masked_attention` gives, in operations that any graph format knows.

    It holds the scores of the whole batch, and takes and returns the same shapes.
    """
    scores_bhqt = query_hqc @ key_bhct + mask_hqt
    if bias_bt is not None:
        scores_bhqt = scores_bhqt + bias_bt[:, None, None]
    return value_bhvt @ scores_bhqt.softmax(dim=-1).mT


class _MaskedAttention(torch.autograd.Function):
    """The two passes of `masked_attention`; weights are recomputed, so only inputs are kept."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Tensor:
        query, key, value, mask, bias = tensors
        attended: Tensor = value.new_empty(*value.shape[:3], query.shape[1])
        for part, (weights, _) in _parts(query, key, mask, bias):
            torch.bmm(value[part].flatten(0, 1), weights.mT, out=attended[part].flatten(0, 1))
        ctx.save_for_backward(query, key, value, mask, bias, attended)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, bias, attended = ctx.saved_tensors
        grad = grad.contiguous()
        total_bhq1 = (grad * attended).sum(dim=2).unsqueeze(3)  # sum over tokens of slope * weight
        grad_query, grad_mask = torch.zeros_like(query), torch.zeros_like(mask)
        grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
        for part, (weights, slope) in _parts(query, key, mask, bias):
            outer = grad[part].flatten(0, 1)
            torch.bmm(outer, weights, out=grad_value[part].flatten(0, 1))
            torch.bmm(outer.mT, value[part].flatten(0, 1), out=slope)
            slope.sub_(total_bhq1[part].flatten(0, 1)).mul_(weights)  # now of the scores
            slope_bhqt = slope.view(-1, *mask.shape)
            torch.bmm(_repeat(query, len(slope_bhqt)).mT, slope, out=grad_key[part].flatten(0, 1))
            grad_query += torch.matmul(slope_bhqt, key[part].mT).sum(dim=0)
            grad_mask += slope_bhqt[0] if len(slope_bhqt) == 1 else slope_bhqt.sum(dim=0)
        return grad_query, grad_key, grad_value, grad_mask, None


def _parts(
    query: Tensor, key: Tensor, mask: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Walk over the batch: a slice of images, their weights, and a spare buffer of that shape.

    Both buffers are (images * heads, queries, tokens) and are used again for the next slice. On
    a processor a slice is one image, because its scores fit the cache; a GPU takes what fills it.
    """
    batch, heads = key.shape[:2]
    size = _images_at_once(mask, batch)
    spare, weights = mask.new_empty(2, size * heads, *mask.shape[1:])
    repeated_query, repeated_mask = _repeat(query, size), _repeat(mask, size)
    for start in range(0, batch, size):
        part = slice(start, min(start + size, batch))
        lanes = (part.stop - start) * heads
        scores, out = spare[:lanes], weights[:lanes]
        flat_key = key[part].flatten(0, 1)
        torch.baddbmm(repeated_mask[:lanes], repeated_query[:lanes], flat_key, out=scores)
        if bias is not None:
            scores.view(-1, *mask.shape).add_(bias[part, None, None])
        torch.softmax(scores, dim=-1, out=out)
        yield part, (out, scores)


def _images_at_once(mask: Tensor, batch: int) -> int:
    if mask.device.type == "cpu":
        return 1
    return max(1, min(batch, _GPU_BUFFER_BYTES // (mask.numel() * mask.element_size())))


def _repeat(per_head: Tensor, size: int) -> Tensor:
    return per_head if size == 1 else per_head.repeat(size, 1, 1)


def project_tokens(linear: nn.Linear, tokens: TapTokens, positions_tc: Tensor) -> Tensor:
    """Give ``linear([features, positions])``, (batch, channels, tokens), for positions of a grid.

    The positions' share is the same for all images, so it is computed once. Tokens lie last in
    memory: the attention walks along them.
    """
    weight, bias = linear.weight, linear.bias
    width = weight.shape[1] - positions_tc.shape[1]
    features = tokens.filled(weight.dtype)
    of_positions_tc = positions_tc @ weight[:, width:].mT + bias
    mixed_btc = features @ weight[:, :width].mT + of_positions_tc
    return mixed_btc.mT.contiguous()


def normalise_tokens(norm: nn.BatchNorm1d, tokens: TapTokens, dtype: torch.dtype) -> Tensor:
    """Normalise each channel over all tokens of a batch, padded ones left out and given as 0."""
    patch_btd = tokens.patch.to(dtype)
    if tokens.valid is None:
        return norm(patch_btd.flatten(0, 1)).view_as(patch_btd)
    normalised = torch.zeros_like(patch_btd)
    normalised[tokens.valid] = norm(patch_btd[tokens.valid])
    return normalised


def minus_infinity_outside(valid_bt: Tensor | None) -> Tensor | None:
    """Give (batch, tokens) logits that keep padded tokens from being read; None: there are none."""
    if valid_bt is None:
        return None
    return torch.zeros(valid_bt.shape, device=valid_bt.device).masked_fill(~valid_bt, -math.inf)


def position_queries(linear: nn.Linear, *, n_heads: int, side: int, step: float = 1.0) -> Tensor:
    """Give (heads, queries, channels) for a square grid, scaled by 1 / sqrt(channels)."""
    dim = linear.in_features
    positions_qc = position_encoding((side, side), dim=dim, step=step, like=linear.weight)
    query_qhc = linear(positions_qc).view(side * side, n_heads, -1)
    scaled: Tensor = query_qhc.transpose(0, 1) * (1 / math.sqrt(query_qhc.shape[2]))
    return scaled


def mask_logits(
    mask: LocalityMask | None, *, n_heads: int, side: int, grid: tuple[int, int], like: Tensor
) -> Tensor:
    """Give (heads, queries, tokens) of a mask from a square grid of queries; None: zeros."""
    if mask is None:
        return like.new_zeros(n_heads, side * side, math.prod(grid))
    mask_hqt: Tensor = mask(squared_distances((side, side), grid, like=like))
    return mask_hqt


def split_heads(mixed_bdt: Tensor, n_heads: int) -> Tensor:
    """Give (batch, n_heads, channels a head, tokens) of (batch, channels, tokens), in place."""
    return mixed_bdt.unflatten(1, (n_heads, -1))  # type: ignore[no-untyped-call]


class Upscale(nn.Module):
    """Enlarge a map by a whole factor, bilinearly, as two small matrix products.

    The numbers are those of antialiased bilinear interpolation with half-pixel centres (when
    enlarging, the antialiasing filter is the plain one), at a fraction of the time, and the
    backward pass is deterministic on every device. No parameters.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, map_bnyx: Tensor) -> Tensor:
        """Give (batch, channels, factor * rows, factor * columns)."""
        # A traced tensor must not stay in the cache.
        make = bilinear_weights if torch.compiler.is_compiling() else _cached_weights
        rows = make(map_bnyx.shape[2], self._factor).to(map_bnyx)
        columns = make(map_bnyx.shape[3], self._factor).to(map_bnyx)
        return rows @ (map_bnyx @ columns.mT)


def bilinear_weights(length: int, factor: int) -> Tensor:
    """Give the (factor * length, length) matrix float64 that enlarges one axis; rows sum to 1."""
    centres = (torch.arange(factor * length, dtype=torch.float64) + 0.5) / factor - 0.5
    centres = centres.clamp(0, length - 1)
    distance = (centres[:, None] - torch.arange(length)).abs()
    return (1 - distance).clamp(min=0)


_cached_weights = lru_cache(maxsize=32)(bilinear_weights)


def feed_forward(width: int, out_width: int) -> nn.Sequential:
    """Build the two-layer perceptron after the attention: twice as wide inside, norm at its end.

    ``(w + 1) 2w + (2w + 1) o + 2o`` parameters for width w and out_width o.
    """
    layers = (nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, out_width))
    return nn.Sequential(*layers, nn.LayerNorm(out_width))


def upscaling_cnn(
    channels: int, inner: int, n_outputs: int, *, factors: Sequence[int] = (2, 2, 2)
) -> nn.Sequential:
    """Build blocks of a 3x3 convolution and a transposed one of kernel and stride f, then a 1x1.

    Every convolution but the last is followed by a ReLU; the map grows by the product of the
    factors. Weights lie channels last, which is four times faster on a processor with so few
    channels.
    """
    layers: list[nn.Module] = []
    for factor, block_channels in zip(factors, (channels, *[inner] * len(factors)), strict=False):
        layers += [nn.Conv2d(block_channels, inner, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(inner, inner, factor, stride=factor), nn.ReLU(inplace=True)]
    cnn = nn.Sequential(*layers, nn.Conv2d(inner, n_outputs, 1))
    return cnn.to(memory_format=torch.channels_last)

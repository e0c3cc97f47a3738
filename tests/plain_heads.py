"""DeAP written as plainly as its definition reads, one head and one image at a time.

It shares no code with `heads.deap`; it only reads the weights of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from heads.deap import Deap


def plain_deap(head: Deap, features_btd: Tensor, grid: tuple[int, int], mask_form: str) -> Tensor:
    """Give the head's output by concatenating, masking, and enlarging 16 channels, step by step."""
    side = head.options.queries
    images = [
        _attend(head, features_td, grid, mask_form, (side, side)) for features_td in features_btd
    ]
    attended_bqv = torch.stack(images)
    tokens_bqd = attended_bqv
    for layer in head.ffn:
        tokens_bqd = layer(tokens_bqd)
    map_bdyx = tokens_bqd.transpose(1, 2).reshape(len(images), -1, side, side).contiguous()
    return _skip(head, map_bdyx) + _cnn(head, map_bdyx)


def _attend(head, features_td, grid, mask_form, query_grid):
    n_heads, dim = head.options.heads, head.options.dim
    positions = _positions(grid).to(features_td)
    tokens = torch.cat([features_td, positions], dim=1)
    weight, bias = head.key_value.weight, head.key_value.bias
    query = functional.linear(
        _positions(query_grid).to(features_td), head.query.weight, head.query.bias
    )
    key = functional.linear(tokens, weight[:dim], bias[:dim])
    value = functional.linear(tokens, weight[dim:], bias[dim:])
    outputs = []
    for q, k, v, sigma in zip(
        query.chunk(n_heads, 1), key.chunk(n_heads, 1), value.chunk(n_heads, 1), head.mask.sigma,
        strict=True,
    ):  # fmt: skip
        logits = q @ k.T / math.sqrt(dim // n_heads) + _mask(sigma, query_grid, grid, mask_form)
        outputs.append(logits.softmax(dim=1) @ v)
    return torch.cat(outputs, dim=1)


def _positions(grid):
    rows = [
        [f(p * t) for p in (x, y) for f in (math.sin, math.cos) for t in (1.0, 0.01)]
        for y in range(grid[0])
        for x in range(grid[1])
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _mask(sigma, query_grid, grid, mask_form):
    distance = torch.cdist(_corner_points(query_grid), _corner_points(grid)).to(sigma.dtype)
    power = 4 if mask_form == "code" else 2
    return torch.exp(-(distance**power) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


def _corner_points(grid):
    def at(i, n):
        return i / (n - 1) if n > 1 else 0.0

    points = [(at(y, grid[0]), at(x, grid[1])) for y in range(grid[0]) for x in range(grid[1])]
    return torch.tensor(points, dtype=torch.float64)


def _skip(head, map_bdyx):
    size = [8 * n for n in map_bdyx.shape[2:]]
    large = functional.interpolate(
        map_bdyx, size=size, mode="bilinear", antialias=True, align_corners=False
    )
    return functional.conv2d(large, head.skip.weight, head.skip.bias)


def _cnn(head, map_bdyx):
    layers = [layer for layer in head.cnn if not isinstance(layer, torch.nn.ReLU)]
    x = map_bdyx
    for convolution, doubling in zip(layers[0:6:2], layers[1:6:2], strict=True):
        x = functional.conv2d(x, convolution.weight, convolution.bias, padding=1).relu()
        x = functional.conv_transpose2d(x, doubling.weight, doubling.bias, stride=2).relu()
    return functional.conv2d(x, layers[6].weight, layers[6].bias)

"""DeAP and MAXA written as plainly as their definitions read, one head and one image at a time.

They share no code with `heads`; they only read the weights of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from heads.deap import Deap
from heads.maxa import Maxa


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


def _positions(grid, factors=(1.0, 0.01)):
    rows = [
        [f(p * t) for p in (x, y) for f in (math.sin, math.cos) for t in factors]
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


def plain_maxa(head: Maxa, features_btd: Tensor, grid: tuple[int, int], mask_form: str) -> Tensor:
    """Give the output of a MAXA head on the grid that it was made for."""
    side = head.options.queries
    images = [_two_layers(head, features_td, grid, mask_form) for features_td in features_btd]
    map_bdyx = torch.stack(images).transpose(1, 2).reshape(len(images), -1, side, side).contiguous()
    return _skip(head, map_bdyx) + _cnn(head, map_bdyx, (4, 2))


def _two_layers(head, features_td, grid, mask_form):
    options, query_grid = head.options, (head.options.queries,) * 2
    tokens = torch.cat([features_td, head.positions], dim=1)
    positions = _positions(query_grid, (1.0, 0.1, 0.01, 0.001)).to(features_td)
    answer = head.first.query(positions)
    for layer in (head.first, head.second):
        mixed, outputs = layer.key_value(tokens), []
        for number in range(options.heads):
            key_part = slice(number * 4, number * 4 + 4)
            value_part = slice(options.dim + number * 8, options.dim + number * 8 + 8)
            logits = answer[:, key_part] @ mixed[:, key_part].T / 2
            if layer is head.first:
                logits = logits + _mask(layer.mask.sigma[number], query_grid, grid, mask_form)
            outputs.append(logits.softmax(dim=1) @ mixed[:, value_part])
        answer = torch.cat(outputs, dim=1)
        for part in layer.ffn:
            answer = part(answer)
    return answer


def _skip(head, map_bdyx):
    size = [8 * n for n in map_bdyx.shape[2:]]
    large = functional.interpolate(
        map_bdyx, size=size, mode="bilinear", antialias=True, align_corners=False
    )
    return functional.conv2d(large, head.skip.weight, head.skip.bias)


def _cnn(head, map_bdyx, factors=(2, 2, 2)):
    layers = [layer for layer in head.cnn if not isinstance(layer, torch.nn.ReLU)]
    x, last = map_bdyx, layers[-1]
    for convolution, growing, factor in zip(layers[0:-1:2], layers[1:-1:2], factors, strict=True):
        x = functional.conv2d(x, convolution.weight, convolution.bias, padding=1).relu()
        x = functional.conv_transpose2d(x, growing.weight, growing.bias, stride=factor).relu()
    return functional.conv2d(x, last.weight, last.bias)

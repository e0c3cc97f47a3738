"""Content hashes: how images, plans and weights are named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def image_key(data: bytes) -> str:
    """Name an image by its file's bytes: the first 128 bits of their SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()[:32]


def pixel_hash(pixels_hwc: np.ndarray) -> str:
    """Name decoded pixels by dtype, shape and values: 128 bits of SHA-256, in hex."""
    digest = hashlib.sha256(f"{pixels_hwc.dtype.str}{pixels_hwc.shape}".encode())
    digest.update(np.ascontiguousarray(pixels_hwc).data)
    return digest.hexdigest()[:32]


def canonical_json(value: Any) -> str:
    """Write JSON that is the same on every machine: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def short_key(value: Any) -> str:
    """Name a JSON value: 16 hex digits (64 bits) of the SHA-256 of its canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def tensors_hash(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Name a set of named arrays by name, dtype, shape and bytes, in name order: SHA-256 hex.

    Args:
        tensors: Pairs of name and array; bfloat16 comes as its bits in uint16.
    """
    digest = hashlib.sha256()
    for name, array in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

"""How numbers become stored numbers, each way with a stated error bound.

* float16: round to nearest; relative error at most 2**-11 for magnitudes from 2**-14 to 65504,
  absolute error at most 2**-25 below.
* bfloat16 (stored as uint16 bits): round to nearest even; relative error at most 2**-8.
* float32: exact.
"""

from __future__ import annotations

import numpy as np

from featstore.errors import invalid
from featstore.plan import DTYPES

LIMITS = {"float16": 65504.0, "bfloat16": 3.3895314e38, "float32": 3.4028235e38}
"""Largest magnitude that each dtype holds; a larger one stops that image."""

RELATIVE_ERROR = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}
ABSOLUTE_ERROR = {"float16": 2.0**-25, "bfloat16": 2.0**-133, "float32": 0.0}
"""`abs(decode(encode(x)) - x) <= RELATIVE_ERROR * abs(x) + ABSOLUTE_ERROR`."""


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Turn numbers into stored numbers of `dtype`; bfloat16 gives its bits in uint16.

    Args:
        values: Any float array, finite and within `LIMITS[dtype]`.
        dtype: "float16", "bfloat16" or "float32".

    Raises:
        InvalidInputError: A value is not finite or too large, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise invalid("dtype", dtype, f"one of {', '.join(DTYPES)}")
    largest = float(np.abs(values, dtype=np.float64).max(initial=0.0))
    if not largest <= LIMITS[dtype]:  # also true for NaN
        raise invalid("values", largest, f"finite and at most {LIMITS[dtype]:g} for {dtype}")
    if dtype == "bfloat16":
        return _bfloat16_bits(values.astype(np.float32, copy=False))
    return values.astype(dtype)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Round to nearest, ties to even, before the lower half is dropped.
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """Turn stored numbers into float32, into `out` where given (same shape, float32)."""
    result = np.empty(stored.shape, np.float32) if out is None else out
    if dtype == "bfloat16":
        np.left_shift(stored, np.uint32(16), out=result.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(result, stored)
    return result

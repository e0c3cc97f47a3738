"""Every codec keeps the error bound that it states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from featstore.codecs import ABSOLUTE_ERROR, LIMITS, RELATIVE_ERROR, decode, encode
from featstore.errors import InvalidInputError
from featstore.plan import DTYPES


@st.composite
def numbers(draw):
    """Draw numbers of every magnitude that float16 holds: the exponent is drawn too."""
    shape = draw(npst.array_shapes(max_dims=3, max_side=6))
    unit = draw(npst.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))
    return np.ldexp(unit, draw(st.integers(-40, 15))).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=numbers())
def test_a_decoded_number_is_within_the_bound(dtype, values):
    off = np.abs(decode(encode(values, dtype), dtype).astype(np.float64) - values)
    assert (off <= RELATIVE_ERROR[dtype] * np.abs(values) + ABSOLUTE_ERROR[dtype]).all()


@given(values=numbers())
def test_bfloat16_bits_are_torchs(values):
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(encode(values, "bfloat16"), expected.view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(dtype, value):
    with pytest.raises(InvalidInputError, match="finite"):
        encode(np.array([1.0, value], np.float32), dtype)


def test_a_magnitude_beyond_float16_is_refused():
    assert encode(np.array([LIMITS["float16"]], np.float32), "float16")[0] == 65504
    with pytest.raises(InvalidInputError, match="65504"):
        encode(np.array([65519.0], np.float32), "float16")


def test_decoding_into_a_callers_buffer_fills_it():
    stored = encode(np.array([1.5, -2.0], np.float32), "bfloat16")
    out = np.zeros(2, np.float32)
    assert decode(stored, "bfloat16", out) is out
    np.testing.assert_array_equal(out, [1.5, -2.0])

"""Reading ``.npy`` in threads.

numpy parses the headers with `ast`, and two threads that parse at once now and then end in
"SystemError: AST constructor recursion depth mismatch" (seen on CPython 3.11.7).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

_PARSING = threading.Lock()


def load_npy(source: Path | BinaryIO, *, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Load or map an array without pickles, one thread at a time; raises what `numpy.load` does."""
    with _PARSING:
        array: np.ndarray = np.load(source, mmap_mode=mmap_mode, allow_pickle=False)
    return array


def npy_shape(file: BinaryIO) -> tuple[int, ...]:
    """Read the shape in a header, one thread at a time.

    Raises:
        ValueError: It does not parse.
        KeyError: It has another version than 1 or 2.
    """
    version = np.lib.format.read_magic(file)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    with _PARSING:
        return tuple(read[version[0]](file)[0])

"""Arrays of features in files: .npy, .pt and HDF5, read entry by entry."""

from __future__ import annotations

import pickle
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.errors import BadImageError, InvalidInputError, NotFoundError, not_found
from featstore.npy import load_npy

if TYPE_CHECKING:
    import torch

FEATURE_SUFFIXES = (".npy", ".pt", ".pth", ".h5", ".hdf5")
_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError)


class ArrayFile:
    """One array in one file; `read` may be called from several threads.

    An .npy file is mapped into memory, a .pt file too where its format allows it, and from HDF5
    only the entry that is asked for is read.
    """

    def __init__(self, path: Path, array: str | None) -> None:
        if path.suffix.lower() not in FEATURE_SUFFIXES:
            raise InvalidInputError(f"{path} must end in {', '.join(FEATURE_SUFFIXES)}.")
        self.path = path
        self._array = array
        self._lock = threading.Lock()

    def shape(self, entry: int | None) -> tuple[int, ...]:
        """Give the shape of one entry, or with None of the whole array.

        Raises:
            InvalidInputError: The file is missing or does not hold an array of features.
            NotFoundError: The file holds several arrays, and not the one that is named.
        """
        shape = self._whole_shape()
        if 0 in shape or not 1 <= len(shape) - (entry is not None) <= 4:
            raise InvalidInputError(f"{self.path} holds no features: its shape is {shape}.")
        return shape if entry is None else shape[1:]

    def read(self, entry: int | None) -> np.ndarray:
        """Give one entry, or with None the whole array, as floating point numbers.

        Raises:
            BadImageError: The file is missing or damaged, or its numbers are no floating point.
        """
        try:
            values = self._read(entry)
        except BadImageError:
            raise
        except (NotFoundError, *_DAMAGE) as error:
            raise BadImageError(f"{self.path} cannot be read ({error}).") from error
        if not np.issubdtype(values.dtype, np.floating):
            raise BadImageError(
                f"{self.path} holds {values.dtype} numbers; features must be floating point."
            )
        return values

    def _whole_shape(self) -> tuple[int, ...]:
        if self._is_hdf5:
            from featstore.datasets.hdf5 import array_shape  # loads h5py

            return array_shape(self.path, self._hdf5_name())
        try:
            opened = self._open()
        except InvalidInputError:
            raise
        except _DAMAGE as error:
            raise InvalidInputError(f"{self.path} cannot be read ({error}).") from error
        return tuple(opened.shape)

    def _read(self, entry: int | None) -> np.ndarray:
        if self._is_hdf5:
            from featstore.datasets.hdf5 import read_entry  # loads h5py

            return read_entry(self.path, self._hdf5_name(), entry)
        opened = self._open()
        part = opened if entry is None else opened[entry]
        if isinstance(part, np.ndarray):
            return np.array(part)
        # NumPy has no bfloat16; float32 holds every value of it.
        wide = part.detach().float() if part.is_floating_point() else part
        return np.array(wide.numpy())

    @property
    def _is_hdf5(self) -> bool:
        return self.path.suffix.lower() in (".h5", ".hdf5")

    def _hdf5_name(self) -> str:
        from featstore.datasets.hdf5 import array_names  # loads h5py

        return self._pick(array_names(self.path))

    def _open(self) -> np.ndarray | torch.Tensor:
        """Open the array without reading it; a mapping costs little, so none is kept."""
        if self.path.suffix.lower() == ".npy":
            return load_npy(self.path, mmap_mode="r")
        return self._open_torch()

    def _open_torch(self) -> torch.Tensor:
        import torch  # heavy, and needed for .pt files alone

        with self._lock:
            loaded: Any = torch.load(
                self.path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(self.path),  # the format before 2020 cannot be mapped
            )
        if isinstance(loaded, dict):
            loaded = loaded[self._pick([key for key in loaded if isinstance(key, str)])]
        if not isinstance(loaded, torch.Tensor):
            raise InvalidInputError(f"{self.path} must hold a tensor or a dict of tensors.")
        return loaded

    def _pick(self, names: list[str]) -> str:
        """Choose the array that is named, or the only one there is."""
        if self._array is None and len(names) == 1:
            return names[0]
        if self._array not in names:
            hint = "Pick one with array=NAME."
            raise not_found(f"array in {self.path.name}", self._array or "", names, hint=hint)
        return self._array

"""Stored rows as a map-style PyTorch data set, for people with their own loop.

`FeatureSet.stream` is faster: it reads ahead in threads and copies a row once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from featstore.errors import InvalidInputError, invalid
from featstore.rows import RowReader
from featstore.select import as_rows, check_rows, select_rows
from featstore.store import FeatureSetFolder

if TYPE_CHECKING:
    from featstore.api import FeatureSet


class FeatureDataset(Dataset[dict[str, Tensor]]):
    """Selected rows of a feature set; item i is a dict of one tensor a tap, and "row".

    Works under a `DataLoader` with spawned workers: what is pickled is a path and row numbers, and
    each process opens its own files when it first reads. Do not fork once files are open.
    """

    def __init__(
        self,
        features: FeatureSet,
        taps: Sequence[str],
        *,
        where: str | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
        dtype: str | None = None,
    ) -> None:
        """Select the rows, as `featstore.stream.open_stream` does.

        Args:
            features: Feature set.
            taps: "TAP" or "TAP/prefix".
            where: One SQL expression over the view `samples`.
            rows: Row numbers instead.
            dtype: None (as stored) or "float32".

        Raises:
            NotFoundError: A tap or row is not stored, or no row fulfils `where`.
            InvalidInputError: An argument is wrong.
        """
        if where is not None and rows is not None:
            raise InvalidInputError("Give `where` or `rows`, not both.")
        if isinstance(taps, str) or not taps:
            raise invalid("taps", taps, "a list of one or more taps")
        if dtype not in (None, "float32"):
            raise invalid("dtype", dtype, 'None (as stored) or "float32"')
        folder = features.folder
        self.taps = tuple(taps)
        self._path = str(folder.path)
        self._dtype = dtype
        self._is_bfloat16 = folder.dtype == "bfloat16" and dtype is None
        self._readers: dict[str, RowReader] = {}
        for reader in self._open().values():
            reader.close()
        if rows is None:
            self.rows = select_rows(folder, self.taps, where)
        else:
            self.rows = as_rows(rows)
            check_rows(folder, self.taps, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Tensor]]:
        """Read several items at once; `DataLoader` calls this with a batch of places.

        Raises:
            IndexError: A place is out of range.
            FormatError: Stored bytes are damaged.
        """
        rows = self.rows[np.asarray(places, dtype=np.int64)]
        found = {name: self._read(reader, rows) for name, reader in self._open().items()}
        numbers = torch.from_numpy(rows)
        return [
            {**{name: tensor[place] for name, tensor in found.items()}, "row": numbers[place]}
            for place in range(len(rows))
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def _open(self) -> dict[str, RowReader]:
        if not self._readers:
            folder = FeatureSetFolder(Path(self._path))
            is_float32 = self._dtype == "float32"
            self._readers = {
                name: RowReader(folder, name, as_float32=is_float32, n_readers=len(self.taps))
                for name in self.taps
            }
        return self._readers

    def _read(self, reader: RowReader, rows: np.ndarray) -> Tensor:
        out = reader.empty(len(rows))
        reader.read_into(rows, out)
        tensor = torch.from_numpy(out)
        return tensor.view(torch.bfloat16) if self._is_bfloat16 else tensor

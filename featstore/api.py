"""The public way to read a store: `Store` and `FeatureSet`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from featstore import index, labels, stream
from featstore.errors import NotFoundError
from featstore.feature_sets import FinalNorm, find_feature_set, read_final_norm
from featstore.ledgers import ledgers_of
from featstore.lines import read_columns
from featstore.plan import ExtractPlan
from featstore.store import (
    PLACEMENT_COLUMNS,
    FeatureSetFolder,
    StoreFolder,
    create_folder,
    locate,
    open_folder,
    placement_from_row,
)
from featstore.tail import TailSpec, TailWeights
from featstore.tail_file import find_tail, read_tail
from featstore.types import Label, Placement, TapShape
from featstore.version import __version__

if TYPE_CHECKING:
    import dask.array


class FeatureSet:
    """What one way of running one backbone gave, for every stored image."""

    def __init__(self, store: Store, folder: FeatureSetFolder) -> None:
        self.store = store
        self.folder = folder
        self._placements: pa.Table | None = None

    def __repr__(self) -> str:
        return f"FeatureSet({self.name!r}, key={self.key!r}, taps={list(self.taps)})"

    @property
    def key(self) -> str:
        """Hash of what decides the numbers: 16 hex digits."""
        return self.folder.key

    @property
    def name(self) -> str:
        """Name for people; several feature sets may share one."""
        return str(self.folder.attributes["name"])

    @property
    def plan(self) -> ExtractPlan | None:
        """The plan by value; None where the features were imported."""
        return self.folder.plan

    @property
    def is_foreign(self) -> bool:
        """Whether the features were imported, so that nothing can be predicted on new images."""
        return self.folder.plan is None

    @property
    def backbone(self) -> dict[str, Any]:
        """Identity of the backbone, enough to load it again."""
        return dict(self.folder.attributes["backbone"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Library versions, source of the weights, batch size."""
        return dict(self.folder.attributes["provenance"])

    @property
    def taps(self) -> dict[str, TapShape]:
        """Stored taps and their shapes."""
        return self.folder.taps

    @property
    def dtype(self) -> str:
        """Dtype of the stored numbers; "bfloat16" lies on the disk as its bits in uint16."""
        return self.folder.dtype

    @property
    def shard_rows(self) -> int:
        """Rows a shard."""
        return self.folder.layout.shard_rows

    def final_norm(self) -> FinalNorm | None:
        """Give the backbone's final norm, or None where it has none."""
        return read_final_norm(self.folder)

    def tail(self, n_blocks: int) -> TailWeights:
        """Read the last blocks of the backbone; see `featstore.tail_file.read_tail`."""
        return read_tail(self.folder, n_blocks)

    @property
    def tail_spec(self) -> TailSpec | None:
        """The stored tail without its weights; None where none is stored."""
        return find_tail(self.folder)

    def placements(self, rows: Sequence[int] | np.ndarray) -> dict[int, Placement]:
        """Tell how the image of each row was drawn into the backbone's input."""
        if self._placements is None:
            self._placements = read_columns(self.folder, ["row", *PLACEMENT_COLUMNS])
        wanted = np.unique(np.asarray(rows, np.int64))
        at = np.searchsorted(self._placements["row"].to_numpy(), wanted)
        known = self._placements.take(pa.array(at[at < len(self._placements)])).to_pylist()
        found = {line["row"]: placement_from_row(line) for line in known}
        return {int(row): found[int(row)] for row in rows}

    def current_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tell which rows have the numbers of these now: others only where a compaction moved them.

        Rows can be read by either number; `samples` lists the current one.
        """
        return ledgers_of(self.folder).tombstones().current(np.asarray(rows, np.int64))

    def samples(self, where: str | None = None) -> pa.Table:
        """List the committed rows with their items; see `Store.samples`."""
        return self.store.samples(where, feature_set=self.key)

    def stream(self, taps: Sequence[str], **options: Any) -> stream.Stream:
        """Go through the stored rows in batches; see `featstore.stream.open_stream`."""
        return stream.open_stream(self.folder, taps, **options)

    def read(self, tap: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read rows of one tap, in the given order; see `featstore.stream.read_rows`."""
        return stream.read_rows(self.folder, tap, rows)

    def to_numpy(self, tap: str, where: str | None = None) -> np.ndarray:
        """Read a whole tap into memory; see `featstore.stream.to_numpy`."""
        return stream.to_numpy(self.folder, tap, where=where)

    def dask(self, tap: str) -> dask.array.Array:
        """Give a lazy array of a tap; see `featstore.stream.to_dask`."""
        return stream.to_dask(self.folder, tap)


class Store:
    """A store on disk. Cheap to open; holds no file open."""

    def __init__(self, folder: StoreFolder) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self.folder.path

    @property
    def is_writable(self) -> bool:
        """Whether this process may write to the store."""
        return self.folder.is_writable

    def feature_sets(self) -> list[FeatureSet]:
        """List the feature sets, by key."""
        keys = self.folder.feature_set_keys()
        return [FeatureSet(self, self.folder.feature_set(key)) for key in keys]

    def feature_set(
        self, key: str | None = None, *, name: str | None = None, backbone: str | None = None
    ) -> FeatureSet:
        """Choose one feature set; without arguments the only one.

        Args:
            key: Key, unique prefix of one, or name.
            name: Name, like "dinov2_b@224".
            backbone: Name of the backbone as it was extracted.

        Raises:
            NotFoundError: None fits.
            InvalidInputError: Several fit; the message tells them apart field by field.
        """
        return FeatureSet(self, find_feature_set(self.folder, key, name=name, backbone=backbone))

    def datasets(self) -> list[str]:
        """List the data sets that have items here."""
        return self.folder.datasets()

    def samples(self, where: str | None = None, *, feature_set: str | None = None) -> pa.Table:
        """List the committed rows joined with their items: the view `samples`.

        Args:
            where: One SQL expression over the view's columns, like ``split = 'train'``.
            feature_set: Key; None lists every feature set's rows.

        Returns:
            A line each row, item and split, ordered by these.

        Raises:
            InvalidInputError: `where` is not one plain expression.
        """
        return index.samples(self.path, where, feature_set)

    def sql(self, query: str, params: Mapping[str, Any] | None = None) -> pa.Table:
        """Answer a read-only SQL query over the index.

        Raises:
            InvalidInputError: The query does not parse, writes, or touches files.
        """
        return index.query(self.path, query, params)

    def read_label(self, dataset: str, item: str, kind: str) -> Label:
        """Read one dense label of one item.

        Raises:
            NotFoundError: The item has no such label.
        """
        found = self.read_labels(dataset, [item], kind)
        if item not in found:
            raise NotFoundError(f"Item {item} of {dataset!r} has no {kind} label.")
        return found[item]

    def read_labels(self, dataset: str, items: Sequence[str], kind: str) -> dict[str, Label]:
        """Read the labels of one kind of some items; items without one are missing."""
        return labels.read_labels(self.folder, dataset, items, kind)

    def iterate_labels(
        self, dataset: str, items: Sequence[str], kind: str
    ) -> Iterator[tuple[str, Label]]:
        """Go through stored labels with one file in memory at a time."""
        return labels.iterate_labels(self.folder, dataset, items, kind)

    def thumbnail(self, dataset: str, item: str) -> bytes | None:
        """Read the JPEG thumbnail of an item, or None where none is stored."""
        return labels.read_thumbnail(self.folder, dataset, item)


def create(path: str | Path) -> Store:
    """Make a new, empty store.

    Raises:
        InvalidInputError: Something lies at `path` already.
        StorageError: The disk refused.
    """
    return Store(create_folder(locate(path), library=__version__))


def open(path: str | Path = "features.zarr") -> Store:  # noqa: A001
    """Open a store: a folder, or a URL (``s3://``, ``gs://``, ``az://``, ``https://``, ``file://``).

    Raises:
        NotFoundError: There is no store at `path`.
        FormatError: It is damaged, or of a format newer than this version reads.
        StorageError: The store behind a URL does not answer within the stated time.
    """
    return Store(open_folder(locate(path)))

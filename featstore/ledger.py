"""The ledger: one small Parquet file a shard and tap, written last. It commits the shard."""

from __future__ import annotations

import pyarrow as pa

from featstore.errors import FormatError, NotFoundError
from featstore.files import read_parquet, write_parquet
from featstore.store import FeatureSetFolder

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("image_key", pa.string()),
        ("crop", pa.string()),
        ("view", pa.string()),
        ("status", pa.string()),  # "ok" or "rejected"
        ("reason", pa.string()),  # why a row was rejected
        ("pixel_hash", pa.string()),  # of the decoded image, where it decoded
        ("patch_crc32c", pa.uint32()),
        ("prefix_crc32c", pa.uint32()),
        ("pooled_crc32c", pa.uint32()),  # of the chunk that all rows of the shard share
        ("abs_max", pa.float32()),
        ("mean", pa.float32()),
        ("std", pa.float32()),
    ]
)


def write_ledger(folder: FeatureSetFolder, tap: str, shard: int, table: pa.Table) -> None:
    """Commit one shard of one tap; call it only when every array of it lies on the disk."""
    write_parquet(folder.ledger_path(tap, shard), table.select(SCHEMA.names).cast(SCHEMA))


def read_ledger(folder: FeatureSetFolder, tap: str, shard: int) -> pa.Table:
    """Read the ledger of one shard of one tap, rows ascending.

    Raises:
        NotFoundError: The shard is not committed.
        FormatError: The file is damaged.
    """
    path = folder.ledger_path(tap, shard)
    try:
        table = read_parquet(path)
    except NotFoundError:
        raise NotFoundError(f"Shard {shard} of {tap} in {folder.key} is not committed.") from None
    except FormatError as error:
        raise damaged(path, folder, tap) from error
    if table.schema.names != SCHEMA.names:
        raise damaged(path, folder, tap)
    return table


def damaged(path: object, folder: FeatureSetFolder, tap: str) -> FormatError:
    """Build the error for a damaged ledger."""
    return FormatError(
        f"{path} (ledger of {tap} in feature set {folder.key}) is damaged. "
        "Run `featstore verify --repair`."
    )

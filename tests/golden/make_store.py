"""Write the golden store of the current format.

    python -m tests.golden.make_store

Run it once, when a format is new; a store that is here is never written again, because the point
of it is that later versions read what this one wrote.
"""

from __future__ import annotations

from pathlib import Path

from featstore.plan import FORMAT_VERSION, RunOptions
from tests.fakes import FakeReader, fake_extract

if __name__ == "__main__":
    path = Path(__file__).parent / f"format{FORMAT_VERSION}.zarr"
    if path.exists():
        raise SystemExit(f"{path} is there already; it must not change.")
    reader = FakeReader(9, bad=[3], source_hw=(16, 24), n_groups=3)
    options = RunOptions(views=("plain", "hflip"), n_threads=1)
    fake_extract(path, [reader], shard_rows=8, options=options)
    print(path)

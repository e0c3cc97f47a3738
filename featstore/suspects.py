"""Which image did the processes die of that had a shard in hand?

A shard whose holder died is looked through before it is begun anew: image by image, with a note
of the one that is being loaded. Whoever dies then leaves the note behind. A death by chance leaves
some image, so that one is suspect only where two processes died of it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featstore.claims import notes_of
from featstore.errors import BadImageError
from featstore.shard_job import ShardJob, Source
from featstore.store import StoreFolder

_DEATHS = 2


def look_through(store: StoreFolder, job: ShardJob, source: Source) -> None:
    """Load the images of a shard one by one, so that it is known which one ends the process.

    Args:
        store: Store.
        job: The shard, whose last holder died.
        source: Loads the images; what it refuses is not looked at here.
    """
    path = notes_of(store, job.folder.key, job.shard) / f"{job.claim.deaths}.{job.claim.nonce}"
    for line in job.lines:
        if line["row"] not in job.removed:
            _note(path, line["row"])
            with contextlib.suppress(BadImageError, OSError):
                source.load(line)
    path.unlink(missing_ok=True)


def _note(path: Path, row: int) -> None:
    """Write which row comes next; where that cannot be, or the claim is lost, nobody needs it."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(row))


def suspect_of(store: StoreFolder, job: ShardJob) -> Mapping[str, Any] | None:
    """Give the line of the image that processes died of; None where it is not known."""
    rows: Counter[int] = Counter()
    for path in notes_of(store, job.folder.key, job.shard).glob("*"):
        with contextlib.suppress(OSError, ValueError):
            rows[int(path.read_text())] += 1
    guilty = [row for row, count in rows.items() if count >= _DEATHS]
    return next((line for line in job.lines if guilty == [line["row"]]), None)

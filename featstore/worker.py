"""What one process of a cluster does: open the source once, then one shard after the other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from featstore.claims import Claims
from featstore.errors import FeatstoreError, InvalidInputError, NotFoundError
from featstore.remote.location import Remote
from featstore.shard_job import Pace, ShardJob, Source, run_jobs
from featstore.shared_shards import ShardTask, claim_task, outcome_of
from featstore.source_specs import SourceSpec
from featstore.store import FeatureSetFolder, StoreFolder, open_folder
from featstore.suspects import look_through, suspect_of
from featstore.version import __version__

MAX_DEATHS = 3
"""A shard of which so many processes died is set aside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterJob:
    """What the processes of one extraction share; it can be pickled."""

    name: str  # no other extraction's; deaths are counted within it
    library: str  # version of featstore
    store: str  # folder
    remote: Remote | None  # what the folder is the mirror of
    key: str
    spec: SourceSpec
    pace: Pace
    n_threads: int | None  # to compute with; None: as many as Dask gave the worker
    n_loaders: int | None  # threads that decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of a task, without what the asker knows."""

    is_held: bool = False  # by another process: ask again later
    is_ours: bool = True
    rejected: Mapping[int, str] = field(default_factory=dict)
    set_aside: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """The source of the job that this process works for, kept from shard to shard."""

    job: str
    store: StoreFolder
    folder: FeatureSetFolder
    source: Source


_busy = threading.Lock()
_opened: _Opened | None = None


def work(
    job: ClusterJob, task: ShardTask, *, n_cores: int, on_rows: Callable[[int], None]
) -> Answer:
    """Do one shard; a process does one at a time.

    Args:
        job: What is done.
        task: The shard.
        n_cores: Cores of this process, where the job does not say how many threads it has.
        on_rows: Called with the number of rows of each batch that is done.

    Raises:
        FeatstoreError: As `shard_job.run_jobs` and `SourceSpec.open` do; the host is named.
    """
    with _busy:
        try:
            here = _open(job, n_cores)
            pace = replace(job.pace, n_threads=job.n_loaders or n_cores)
            return _do(here, job, task, pace, on_rows)
        except FeatstoreError as error:
            raise type(error)(f"On {socket.gethostname()}: {error}") from error
        except Exception as error:
            error.add_note(f"This happened on {socket.gethostname()}.")
            raise


def _do(
    here: _Opened,
    job: ClusterJob,
    task: ShardTask,
    pace: Pace,
    on_rows: Callable[[int], None],
) -> Answer:
    purpose = f"extracting into feature set {job.key}"
    with Claims(here.store, job.key, purpose=purpose, job=job.name) as claims:
        found = claim_task(here.folder, task, claims)
        if found is None:
            return Answer(is_held=True)
        if not isinstance(found, ShardJob):
            return Answer(is_ours=False, rejected=found.rejected)
        if found.claim.deaths >= MAX_DEATHS:
            return Answer(set_aside=_why(here.store, found))
        if found.claim.deaths:
            look_through(here.store, found, here.source)
        [result] = run_jobs([found], here.source, pace=pace, on_batch=on_rows)
        if result.is_lost:
            return Answer(is_held=True)
        return Answer(rejected=outcome_of(here.folder, task, result).rejected)


def _why(store: StoreFolder, job: ShardJob) -> str:
    """Say why a shard is set aside, and which image it is, where that is known."""
    reason = f"{job.claim.deaths} processes died while they did it."
    line = suspect_of(store, job)
    if line is None:
        return reason
    image = f"{line['dataset']}/{line['path']}"
    return f"{reason} They died of {image}: take it out of the data set, and the rest is stored."


def _open(job: ClusterJob, n_cores: int) -> _Opened:
    global _opened
    if _opened is None or _opened.job != job.name:
        _opened = None  # frees the memory of another job's backbone
        if job.library != __version__:
            raise InvalidInputError(
                f"The workers must have featstore {job.library}. Got {__version__}; install the "
                "same version everywhere."
            )
        store = _store(job)
        source = job.spec.open(store, n_threads=job.n_threads or n_cores)
        _opened = _Opened(
            job=job.name, store=store, folder=store.feature_set(job.key), source=source
        )
    return _opened


def _store(job: ClusterJob) -> StoreFolder:
    if job.remote is not None:
        from featstore.remote.mirror import mirror_of, synchronise  # obstore only if it is needed

        mirror = mirror_of(job.remote)
        synchronise(mirror)
        return open_folder(mirror.root)
    try:
        store = open_folder(Path(job.store))
        store.feature_set(job.key)
    except NotFoundError as error:
        raise NotFoundError(
            f"A worker does not see the store {job.store}. Put it on a file system that all "
            "machines share, under one path, or behind a URL."
        ) from error
    return store

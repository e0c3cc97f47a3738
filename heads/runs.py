"""Runs: one folder each, found by id, by the start of an id, or as ``@last``.

``run.json`` says everything that was chosen and measured; it is written first with the status
"running". A training holds the lock file of its folder, which the system frees when the process
dies: a run that says "running" and is not held was interrupted.
"""

from __future__ import annotations

import difflib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featstore.errors import ConflictError, FormatError, NotFoundError, StorageError, invalid
from featstore.files import exclusive, storage_errors, write_json
from featstore.registry import short_name
from featstore.store import StoreFolder, locate, open_folder

RECORD = "run.json"
WEIGHTS = "head.safetensors"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.parquet"
CURVES = "curves.parquet"
PAIRS = "pairs.parquet"
PER_IMAGE = "per_image.parquet"
PICTURES = "pictures"
LAST = "@last"
RUNNING, DONE, INTERRUPTED, FAILED = "running", "done", "interrupted", "failed"
_LOCK = ".lock"
_ID = re.compile(r"[a-z0-9_]+(-[a-z0-9_]+)*-\d{8}-\d{6}-[0-9a-f]{4}")
_LOCK_WAIT_S = 5.0  # longer than a look at the lock takes
_LISTED = 8  # run ids named in one message


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run: its folder and what ``run.json`` says."""

    path: Path
    record: dict[str, Any]

    @property
    def run_id(self) -> str:
        """Name of the run and of its folder."""
        return self.path.name

    @property
    def status(self) -> str:
        """Give "running", "done", "interrupted" or "failed", as it is now."""
        status = str(self.record["status"])
        return INTERRUPTED if status == RUNNING and not is_held(self.path) else status

    @property
    def is_finished(self) -> bool:
        """Whether the run has trained to its end and was measured."""
        return str(self.record["status"]) == DONE

    @property
    def is_protocol(self) -> bool:
        """Whether it is an experiment of many trainings, which has no head of its own."""
        return "kind" in self.record


def new_run_id(head: str, task: str) -> str:
    """Make a readable id that sorts by time among runs of one head and task.

    Args:
        head: Registered name, such as "deap.v1"; the version is left out of the id.
        task: Registered name of the task.
    """
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = "-".join(short_name(name) for name in (head, task))
    return f"{names}-{now}-{secrets.token_hex(2)}"


def runs_folder(store: StoreFolder | None, runs: Path | str | None) -> Path:
    """Give the folder of the runs: `runs` where it is named, else the store's own.

    Raises:
        InvalidInputError: Neither is named, or the store cannot be written and `runs` is None.
    """
    if runs is not None:
        return Path(runs)
    if store is None:
        raise invalid("runs", runs, "a folder where no store is named")
    return store.runs_path


def writable_runs_folder(store: StoreFolder, runs: Path | str | None) -> Path:
    """Give the folder where a new run can be written.

    Raises:
        StorageError: The store is read-only and no other folder is named.
    """
    if runs is None and not store.is_writable:
        raise StorageError(
            f"{store.path} is read-only, so it cannot take a run. Name a folder with --runs DIR."
        )
    return runs_folder(store, runs)


def open_runs(store: str | Path, runs: str | Path | None) -> Path:
    """Give the folder of the runs for a command that names a store and perhaps ``--runs``."""
    return Path(runs) if runs is not None else open_folder(locate(store)).runs_path


def list_runs(store: str | Path, *, runs: str | Path | None = None) -> list[Run]:
    """List the runs of a store, oldest first.

    Args:
        store: The store; not opened where `runs` is given.
        runs: Folder of the runs, where it is not the store's own.

    Raises:
        NotFoundError: There is no store.
        FormatError: A ``run.json`` does not parse.
    """
    return _runs_in(open_runs(store, runs))


def find_run(store: str | Path, text: str, *, runs: str | Path | None = None) -> Run:
    """Find one run by its id, the start of its id, or ``@last``.

    Raises:
        NotFoundError: No run, or several, are meant; the message names the nearest.
    """
    return _pick(_runs_in(open_runs(store, runs)), text)


def remove_run(store: str | Path, text: str, *, runs: str | Path | None = None) -> str:
    """Delete the folder of one run and give its id.

    Raises:
        NotFoundError: There is no such run.
        ConflictError: It is training right now.
    """
    run = find_run(store, text, runs=runs)
    if is_held(run.path):
        raise ConflictError(f"{run.run_id} is still training. Stop it first (Ctrl-C keeps it).")
    with storage_errors(run.path):
        # Without its record a half deleted folder is no run any more.
        (run.path / RECORD).unlink()
        shutil.rmtree(run.path)
    return run.run_id


def read_run(path: Path) -> Run:
    """Read the run that lies in the folder `path`.

    Raises:
        NotFoundError: There is none.
        FormatError: Its ``run.json`` does not parse.
    """
    try:
        record = json.loads((path / RECORD).read_text())
        return Run(path=path, record={**record, "status": record["status"]})
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"No run at {path}: it has no {RECORD}. See `heads ls`.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path / RECORD} is damaged. Remove that folder, or restore it."
        ) from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write ``run.json`` atomically."""
    write_json(path / RECORD, record)


def is_held(path: Path) -> bool:
    """Whether a process is training in this run folder right now."""
    lock = path / _LOCK
    if not lock.exists():
        return False
    try:
        with exclusive(lock, purpose="looking"):
            return False
    except ConflictError:
        return True
    except OSError:  # a folder that cannot be written cannot be trained in either
        return False


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a run folder while training in it.

    Raises:
        ConflictError: Another process trains in it.
    """
    with exclusive(path / _LOCK, purpose=f"training {path.name}", timeout_s=_LOCK_WAIT_S):
        yield


def _runs_in(folder: Path) -> list[Run]:
    found = [read_run(path.parent) for path in folder.glob(f"*/{RECORD}")]
    return sorted(found, key=lambda run: (str(run.record.get("created", "")), run.run_id))


def _pick(runs: list[Run], text: str) -> Run:
    if not runs:
        raise NotFoundError(f"No run {text!r}: there is none yet. Train one with `heads train`.")
    if text == LAST:
        return runs[-1]
    exact = [run for run in runs if run.run_id == text]
    matches = exact or [run for run in runs if text and run.run_id.startswith(text)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise NotFoundError(
            f"{len(matches)} runs start with {text!r}: {_some(matches)}. Give more of the id."
        )
    raise _unknown(runs, text)


def _unknown(runs: list[Run], text: str) -> NotFoundError:
    ids = [run.run_id for run in runs]
    nearest = difflib.get_close_matches(text, ids, n=1, cutoff=0.4)
    guess = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return NotFoundError(f"Unknown run {text!r}.{guess} The newest: {_some(runs[::-1])}.")


def _some(runs: list[Run]) -> str:
    shown = ", ".join(run.run_id for run in runs[:_LISTED])
    return shown if len(runs) <= _LISTED else f"{shown} and {len(runs) - _LISTED} more"

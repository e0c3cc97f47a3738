"""Claims: who does which shard of a feature set, so that many processes may write it at once.

A claim is a small file beside the locks, taken and given up under a lock that is held for
milliseconds. Its holder touches it every few seconds; one that was not touched for a minute is
dead, and so is, at once, one whose process is gone from this machine. The holder looks again,
under the lock, before it commits: whoever lost a shard meanwhile throws its own away.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from featstore.errors import ConflictError
from featstore.files import PARTIAL, exclusive, storage_errors
from featstore.processes import Process, is_gone, this_process
from featstore.remote.location import find_mirror
from featstore.store import FeatureSetFolder, StoreFolder

EXPIRY_S = 60.0
"""After so long without a heartbeat a claim is dead."""
HEARTBEAT_S = 10.0
_LOCK_WAIT_S = 600.0
_UPLOADS_WAIT_S = 24 * 3600.0
_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a claim, as its file says."""

    nonce: str  # stands in the names of the holder's partial files
    process: Process
    purpose: str
    job: str = ""  # of several processes that work for one driver
    deaths: int = 0  # holders of this shard in this job that died before this one

    def __str__(self) -> str:
        return f"Process {self.process.pid} on {self.process.host} ({self.purpose})"


class Claim:
    """One shard of a feature set, held until it is released or lost."""

    def __init__(self, claims: Claims, shard: int, holder: Holder, *, is_taken_over: bool) -> None:
        self.shard = shard
        self.nonce = holder.nonce
        self.deaths = holder.deaths
        self.is_taken_over = is_taken_over  # from a dead process, which may have left files
        self._claims = claims

    @contextlib.contextmanager
    def committing(self) -> Iterator[bool]:
        """Keep every other process from the claims, and tell whether this one still holds.

        The claim is given up afterwards: what was to be done under it is done.
        """
        with self._claims.locked():
            yield self._claims.is_own(self.shard) and self._claims.has_feature_set()
            self._claims.forget(self.shard)

    def release(self) -> None:
        """Give the shard up, if it is still held."""
        with self._claims.locked():
            self._claims.forget(self.shard)


class Claims:
    """What one writer claims of a feature set; used in a ``with``, which ends every claim."""

    def __init__(self, store: StoreFolder, key: str, *, purpose: str, job: str = "") -> None:
        """Prepare to claim; nothing is written yet.

        Args:
            store: Store.
            key: Feature set.
            purpose: What the holder does, in words: "extracting into feature set 3f9c".
            job: Names what several processes work for together; deaths are counted within it.
        """
        self._store = store
        self._key = key
        self._purpose = purpose
        self._job = job
        self._nonce = secrets.token_hex(8)
        self._held: set[int] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        # What cannot be given up (the disk is full, say) dies with this process.
        if self._held:
            with contextlib.suppress(OSError, ConflictError), self.locked():
                for shard in tuple(self._held):
                    self.forget(shard)

    def take(self, shard: int) -> Claim | None:
        """Claim a shard; None where a live process holds it.

        Raises:
            ConflictError: The feature set was removed.
            StorageError: The disk refused.
        """
        with self.locked():
            if not self.has_feature_set():
                raise ConflictError(
                    f"Feature set {self._key} was removed while it was being written. "
                    "Run the command again to make it anew."
                )
            path = self._path(shard)
            found = read_claim(path)
            if found is not None and is_live(path, found):
                return None
            holder = Holder(
                nonce=self._nonce,
                process=this_process(),
                purpose=self._purpose,
                job=self._job,
                deaths=0 if found is None or found.job != self._job else found.deaths + 1,
            )
            with storage_errors(path):
                path.write_text(json.dumps(asdict(holder)))
            self._held.add(shard)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._thread.start()
        return Claim(self, shard, holder, is_taken_over=found is not None)

    def wait_for(self, shard: int, *, timeout_s: float) -> Claim:
        """Claim a shard, once whoever holds it is done.

        Raises:
            ConflictError: Another process holds it for too long; the message names that process.
        """
        deadline = time.monotonic() + timeout_s
        while (claim := self.take(shard)) is None:
            if time.monotonic() >= deadline:
                raise ConflictError(
                    f"{holder_of(self._store, self._key, shard)}. Wait for it to finish, or stop "
                    "it, and run this again."
                )
            time.sleep(_POLL_S)
        return claim

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from the claims of this feature set for a moment."""
        with claims_lock(self._store, self._key, purpose=self._purpose):
            yield

    def is_own(self, shard: int) -> bool:
        """Tell whether a shard is still held here; call it under the lock."""
        found = read_claim(self._path(shard))
        return shard in self._held and found is not None and found.nonce == self._nonce

    def has_feature_set(self) -> bool:
        """Tell whether the feature set is still there."""
        return (self._store.path / "feature_sets" / self._key / "zarr.json").exists()

    def forget(self, shard: int) -> None:
        """Give a shard up, if it is still held; call it under the lock."""
        if self.is_own(shard):
            self._path(shard).unlink(missing_ok=True)
            shutil.rmtree(notes_of(self._store, self._key, shard), ignore_errors=True)
        self._held.discard(shard)

    def _path(self, shard: int) -> Path:
        return claims_folder(self._store, self._key) / f"{shard:05d}.json"

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            for shard in tuple(self._held):
                # A file system that is away for a moment is asked again next time.
                with contextlib.suppress(OSError):
                    if self.is_own(shard):
                        os.utime(self._path(shard))


def claims_folder(store: StoreFolder, key: str) -> Path:
    """Give the folder of the claims of a feature set."""
    return store.locks_path / f"{key}.claims"


def notes_of(store: StoreFolder, key: str, shard: int) -> Path:
    """Give the folder of what holders of a shard note for the next; a release deletes it."""
    return claims_folder(store, key) / f"{shard:05d}.notes"


@contextlib.contextmanager
def claims_lock(store: StoreFolder, key: str, *, purpose: str) -> Iterator[None]:
    """Keep every claim of a feature set as it is; whoever holds its writer lock too took it first.

    Raises:
        ConflictError: Another process holds it for minutes.
    """
    folder = claims_folder(store, key)
    # A shard is sent to a URL under this lock, and others may be before it.
    wait_s = _LOCK_WAIT_S if find_mirror(store.path) is None else _UPLOADS_WAIT_S
    with exclusive(folder.with_suffix(".claims.lock"), purpose=purpose, timeout_s=wait_s):
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
        yield


def read_claim(path: Path) -> Holder | None:
    """Read a claim; None where there is none, or one whose writer died while it wrote."""
    try:
        value = json.loads(path.read_text())
        return Holder(**{**value, "process": Process(**value["process"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def is_live(path: Path, holder: Holder) -> bool:
    """Tell whether the holder of a claim may still be working.

    The age is taken by the clock of the file system, which all machines share.
    """
    if is_gone(holder.process):
        return False
    probe = path.with_name("clock")
    probe.touch()
    # Opening a file makes a network file system ask its server for the times.
    with path.open(), probe.open():
        return probe.stat().st_mtime - path.stat().st_mtime < EXPIRY_S


def live_claims(store: StoreFolder, key: str) -> dict[int, Holder]:
    """List who works at which shard of a feature set; call it under `claims_lock`."""
    found: dict[int, Holder] = {}
    for path in sorted(claims_folder(store, key).glob("*.json")):
        holder = read_claim(path)
        if path.stem.isdecimal() and holder is not None and is_live(path, holder):
            found[int(path.stem)] = holder
    return found


def holder_of(store: StoreFolder, key: str, shard: int) -> str:
    """Say in words who works at a shard."""
    holder = read_claim(claims_folder(store, key) / f"{shard:05d}.json")
    return f"{holder or 'another process'} works at shard {shard} of feature set {key}"


def waiting_message(store: StoreFolder, key: str, shard: int, n_waiting: int) -> str:
    """Say in words what is waited for: so many shards, of which another process has this one."""
    return f"Waiting for {n_waiting} shards: {holder_of(store, key, shard)}."


def is_dead_partial(path: Path, live: Mapping[int, Holder]) -> bool:
    """Tell whether an unfinished file is of a writer that has no claim any more.

    Files that are written under the writer lock or `claims_lock` bear a name of nobody's: whoever
    holds both locks finds no living writer of them.
    """
    parts = path.name.rsplit(".", 2)
    nonces = {holder.nonce for holder in live.values()}
    return path.name.endswith(PARTIAL) and not (len(parts) == 3 and parts[1] in nonces)


def sweep_partials(store: StoreFolder, folder: FeatureSetFolder) -> int:
    """Delete what dead writers left in a feature set; call it under its writer lock.

    Returns:
        How many files that was.
    """
    partials = [path for path in folder.path.rglob(f"*{PARTIAL}") if path.is_file()]
    if not partials:
        return 0
    with claims_lock(store, folder.key, purpose=f"sweeping feature set {folder.key}"):
        live = live_claims(store, folder.key)
        dead = [path for path in partials if is_dead_partial(path, live)]
        for path in dead:
            path.unlink(missing_ok=True)
    return len(dead)

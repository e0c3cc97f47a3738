"""What lies in a store: the files that the index is folded from, by path, time and size."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featstore.store import StoreFolder

Stamp = tuple[int, int]
"""When a file was last changed (ns) and its size in bytes."""
Files = dict[str, Stamp]
"""Path below the store (with "/") to the file's stamp."""

_RUN = re.compile(r"run\.json|metrics\.parquet|curves\.parquet")
_TABLE = re.compile(r".+\.parquet")
_NUMBERED = re.compile(r"\d+\.parquet")
_SETTLED_S = 0.02  # longer than a tick of the clock that stamps files
_SETTLED_FOLDER_S = 2.0  # longer than the coarsest clock that stamps folders
_TRUSTED_S = 30.0  # for how long the stamp of a folder tells that nothing came or went
_MAX_TRUSTED = 256
_trusted: dict[str, _Trusted] = {}


class Vanished(Exception):  # noqa: N818
    """A file was removed after it had been listed: list and read again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """A list of files, and a digest of it that takes no list to compare."""

    files: Files
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trusted:
    """What was found in a folder of ledgers, and how the folder looked."""

    stamp: tuple[int, ...]
    digest: bytes
    until_s: float  # by the monotonic clock


def scan(store: StoreFolder) -> Scan:
    """List the files that the index is made of.

    A file is listed before those that must exist if it does: whatever is written meanwhile, a
    listed ledger has its assignment and its items in the list too.
    """
    files: Files = {}
    digests: list[bytes] = []
    for group in _groups(store, is_quick=False):
        assert not isinstance(group, bytes)
        files.update(group)
        digests.append(_digest(group))
    return Scan(files=files, digest=_joined(digests))


def quick_digest(store: StoreFolder) -> str:
    """Give the digest of `scan` without looking at each ledger again.

    A ledger is never changed in place: it comes and goes by its name, which changes the stamp of
    its folder. Such a stamp is trusted for a while by the process that listed the folder.
    """
    groups = _groups(store, is_quick=True)
    return _joined([one if isinstance(one, bytes) else _digest(one) for one in groups])


def settled_scan(store: StoreFolder) -> Scan:
    """List the files as `scan` does, none of them changed within the clock's last tick.

    A file that is replaced twice within one tick by files of one size bears the same stamp twice.
    """
    found = scan(store)
    newest = max((mtime_ns for mtime_ns, _ in found.files.values()), default=0)
    if abs(time.time_ns() - newest) < _SETTLED_S * 1e9:
        time.sleep(_SETTLED_S)
        found = scan(store)
    return found


def ledger_stamps(folder: Path) -> dict[int, tuple[str, Stamp]]:
    """List the ledgers in the folder of a tap: shard to name and stamp."""
    found = _stamped(folder, _NUMBERED, str(folder.parent))
    names = ((path.rpartition("/")[2], stamp) for path, stamp in found)
    return {int(name.partition(".")[0]): (name, stamp) for name, stamp in names}


def _groups(store: StoreFolder, *, is_quick: bool) -> Iterator[Files | bytes]:
    """Give the files folder by folder; where that is quick, of folders of ledgers the digest."""
    root = str(store.path)
    for folder in _folders(store.path / "feature_sets"):
        yield from _feature_set(folder, root, is_quick=is_quick)
    for folder in _folders(store.path / "items"):
        tables = list(_stamped(folder, _TABLE, root))
        about = list(_stamped(folder, re.compile(r"dataset\.json"), root))
        if about:
            yield dict([*tables, *about])
    for folder in _folders(store.runs_path):
        files = dict(_stamped(folder, _RUN, root))
        # Without its record a half deleted folder is no run.
        if any(path.endswith("/run.json") for path in files):
            yield files


def _feature_set(folder: Path, root: str, *, is_quick: bool) -> list[Files | bytes]:
    buried = dict(_stamped(folder / "tombstones", _TABLE, root))
    taps = [_ledgers(tap, root, is_quick=is_quick) for tap in _folders(folder / "ledger")]
    assigned = dict(_stamped(folder / "assignments", _NUMBERED, root))
    about = dict(_stamped(folder, re.compile(r"zarr\.json"), root))
    return [buried, *taps, assigned, about] if about else []


def _ledgers(folder: Path, root: str, *, is_quick: bool) -> Files | bytes:
    name, stamp = str(folder), _folder_stamp(folder)
    known = _trusted.get(name)
    is_trusted = known is not None and known.stamp == stamp and time.monotonic() < known.until_s
    if is_quick and known is not None and is_trusted:
        return known.digest
    files = dict(_stamped(folder, _NUMBERED, root))
    if stamp and abs(time.time_ns() - stamp[-1]) > _SETTLED_FOLDER_S * 1e9:
        if len(_trusted) >= _MAX_TRUSTED:
            _trusted.clear()
        until_s = time.monotonic() + _TRUSTED_S
        _trusted[name] = _Trusted(stamp=stamp, digest=_digest(files), until_s=until_s)
    return files


def _folder_stamp(folder: Path) -> tuple[int, ...]:
    """Tell how a folder looks, last when a name in it last changed; before it is listed."""
    try:
        about = folder.stat()
    except FileNotFoundError:
        return ()
    return (about.st_dev, about.st_ino, about.st_size, about.st_ctime_ns, about.st_mtime_ns)


def _digest(files: Files) -> bytes:
    """Hash the files of one folder; none have no digest."""
    if not files:
        return b""
    lines = [f"{path}\0{mtime_ns}\0{size}" for path, (mtime_ns, size) in files.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).digest()


def _joined(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _stamped(folder: Path, name: re.Pattern[str], root: str) -> Iterator[tuple[str, Stamp]]:
    """Give the files in a folder that bear such a name: paths below `root`, and stamps."""
    prefix = str(folder)[len(root) + 1 :].replace(os.sep, "/")
    fits = name.fullmatch
    try:
        with os.scandir(folder) as entries:
            chosen = [entry for entry in entries if fits(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in chosen:
        try:
            about = entry.stat()
        except FileNotFoundError:  # removed meanwhile
            continue
        yield f"{prefix}/{entry.name}", (about.st_mtime_ns, about.st_size)

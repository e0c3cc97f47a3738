"""What a URL means, where its mirror lies, and how the environment is asked.

A mirror is a folder with the small files of a store behind a URL. Everything else works on it as
on any store; `find_mirror` tells, for any path below one, which store it stands for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from featstore.errors import FormatError, InvalidInputError, invalid

REMOTE_FILE = ".remote.json"
SCHEMES = ("s3", "gs", "az", "http", "https", "file")
READ_ONLY = ("http", "https")
CACHE_BYTES = 10 * 10**9
TIMEOUT_S = 180.0
_URL = re.compile(r"([a-z][a-z0-9]*):/{1,3}(.*)", re.DOTALL)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kMGT]?)B?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_FOLDERS = ("items", "labels", "feature_sets")
_ENVIRONMENT: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "s3": {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "skip_signature": ("AWS_SKIP_SIGNATURE",),
    },
    "gs": {"skip_signature": ("GOOGLE_SKIP_SIGNATURE",)},
    "az": {
        "account_name": ("AZURE_STORAGE_ACCOUNT_NAME",),
        "endpoint": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        "skip_signature": ("AZURE_SKIP_SIGNATURE",),
    },
}
"""Option of obstore -> variables that it is taken from; none of them is a secret."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """A store behind a URL, and the options that decide which one that is."""

    url: str  # without a slash at its end
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def scheme(self) -> str:
        """What stands before the colon."""
        return self.url.partition(":")[0]

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be written there."""
        return self.scheme in READ_ONLY

    @property
    def name(self) -> str:
        """Name of the mirror's folder: readable, and another one for every URL and endpoint."""
        told = json.dumps([self.url, sorted(self.options.items())])
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self.url).strip("-")[-48:].strip("-")
        return f"{readable}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirror:
    """The local folder that stands for a store behind a URL."""

    root: Path
    remote: Remote

    def key(self, path: Path) -> str:
        """Name the object that a path below the mirror stands for."""
        return path.relative_to(self.root).as_posix()

    def is_mirrored(self, path: Path) -> bool:
        """Tell whether a file is part of the store, and not of this machine."""
        return is_small(self.key(path))

    def url_of(self, path: Path) -> str:
        """Give the URL of the object that a path stands for."""
        return f"{self.remote.url}/{self.key(path)}"

    def is_local(self, path: Path) -> bool:
        """Tell whether a file belongs to this machine only: a run, a lock, an index."""
        parts = self.key(path).split("/")
        return not (self.is_mirrored(path) or is_shard_folder(parts[:-1]))


def is_small(key: str) -> bool:
    """Tell whether an object is mirrored: not a shard, a run, a lock or an index."""
    parts = key.split("/")
    if key.endswith(".partial"):
        return False
    return key == "zarr.json" or (parts[0] in _FOLDERS and not is_shard_folder(parts[:-1]))


def is_shard_folder(parts: list[str]) -> bool:
    """Tell whether a folder lies in an array's `c`: feature_sets/KEY/TAP/ARRAY/c."""
    return parts[0] == "feature_sets" and len(parts) > 4 and parts[4] == "c"


def is_url(store: str | Path) -> bool:
    """Tell whether a store is named by a URL of a scheme that is known here."""
    match = _URL.match(str(store))
    return match is not None and match[1] in SCHEMES


def parse_url(store: str | Path) -> Remote:
    """Read a URL, and the options that belong to it from the environment.

    A `Path` made from a URL has lost a slash, which is given back.

    Raises:
        InvalidInputError: It has a query or a password in it, or names no host or folder.
    """
    match = _URL.match(str(store))
    if match is None:
        raise invalid("store", str(store), f"a URL ({', '.join(SCHEMES)})")
    scheme, rest = match[1], match[2].strip("/")
    url = f"file:///{rest}" if scheme == "file" else f"{scheme}://{rest}"
    parts = urlsplit(url)
    if not rest or parts.query or parts.fragment or "@" in parts.netloc:
        raise InvalidInputError(
            f"{scheme}:// needs a host or bucket, a folder, and no query or password. Give "
            "credentials by the environment, as docs/REMOTE.md tells."
        )
    return Remote(url=url, options=_options(scheme))


def _options(scheme: str) -> dict[str, str]:
    found = {}
    for option, variables in _ENVIRONMENT.get(scheme, {}).items():
        values = [os.environ[name] for name in variables if os.environ.get(name)]
        if values:
            found[option] = values[0]
    return found


def cache_folder() -> Path:
    """Give the folder of mirrors and cached chunks: `FEATSTORE_CACHE`, else the user's cache."""
    said = os.environ.get("FEATSTORE_CACHE")
    if said:
        return Path(said).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "featstore"
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "featstore"


def cache_bytes() -> int:
    """Give the limit of the cached chunks: `FEATSTORE_CACHE_BYTES`, like 50G; 0 keeps none.

    Raises:
        InvalidInputError: It is no size.
    """
    said = os.environ.get("FEATSTORE_CACHE_BYTES")
    if not said:
        return CACHE_BYTES
    match = _SIZE.fullmatch(said.strip())
    if match is None:
        raise invalid("FEATSTORE_CACHE_BYTES", said, "a number of bytes, such as 0 or 50G")
    return int(float(match[1]) * _UNITS[match[2]])


def timeout_s() -> float:
    """Give the seconds after which an object store that does not answer is an error.

    Raises:
        InvalidInputError: `FEATSTORE_TIMEOUT_S` is no positive number.
    """
    said = os.environ.get("FEATSTORE_TIMEOUT_S")
    try:
        found = float(said) if said else TIMEOUT_S
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise invalid("FEATSTORE_TIMEOUT_S", said, "a positive number of seconds")
    return found


def find_mirror(path: Path) -> Mirror | None:
    """Find the mirror that a path lies in; None for a store on this machine's disk."""
    for folder in (path, *path.parents):
        try:
            about = (folder / REMOTE_FILE).stat()
        except OSError:
            continue
        return _read(folder, about.st_mtime_ns)
    return None


@lru_cache(maxsize=64)
def _read(root: Path, _mtime_ns: int) -> Mirror:
    path = root / REMOTE_FILE
    try:
        found: Any = json.loads(path.read_text())
        options = {str(name): str(value) for name, value in found["options"].items()}
        return Mirror(root=root, remote=Remote(url=str(found["url"]), options=options))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path} is damaged. Delete its folder and name the URL again."
        ) from error


def shown(path: Path) -> str:
    """Write where a store lies for people: the URL that a mirror stands for, else the path."""
    mirror = find_mirror(path)
    if mirror is None:
        return str(path)
    return mirror.remote.url if path == mirror.root else mirror.url_of(path)


def refuse_remote(path: Path, what: str) -> None:
    """Refuse what cannot be done to a store behind a URL.

    Raises:
        InvalidInputError: `path` is the mirror of one.
    """
    mirror = find_mirror(path)
    if mirror is not None:
        raise InvalidInputError(
            f"{what} works on a folder, not on a URL. Got {mirror.remote.url}: copy the store to a "
            "disk, do it there and copy it back."
        )

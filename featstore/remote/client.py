"""The door to obstore: requests with retries, a bound on how many at once, and a total time.

An attempt that fails for a reason that may pass (the server is busy, the connection is cut, a body
is too short) is made again after a pause that doubles, with jitter. No attempt is begun after
three quarters of the time that the environment allows, and none may take longer than the last
quarter: what cannot be had is an error within the stated time.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from featstore.errors import ConflictError, InvalidInputError, NotFoundError, StorageError
from featstore.remote.location import Remote, timeout_s
from featstore.remote.pages import links

T = TypeVar("T")
S = TypeVar("S")

N_CONNECTIONS = 16
"""Requests at once of one process to one store."""
PART_BYTES = 8 * 2**20
"""What one request carries of a large object, up or down."""
_UPLOADS = 4
_SLOWEST = 256 * 1024
"""Bytes a second: an upload may take so much longer than the stated time."""
_MD5 = re.compile(r"[0-9a-f]{32}")
_REFUSED = re.compile(r"status code: 40[13]\b")
_LASTING = re.compile(r"status code: 4(?!08|29)\d\d|redirect without LOCATION|not supported")
_ANSWER = re.compile(r"status code: (\d+[A-Za-z ]*)(?:.*?<Code>(\w+)</Code>)?", re.DOTALL)
_CAUSE = re.compile(r'(?<=message: ")[^"]+|(?<=error: ")[^"]+|TimedOut')
_HINTS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a "
    "public bucket.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket.",
    "http": "The server must show lists of its folders.",
    "https": "The server must show lists of its folders.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY.",
}


class _Short(Exception):  # noqa: N818
    """A body has another length or checksum than the server named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One object: `version` changes when its bytes do."""

    key: str
    size: int
    version: str


class Client:
    """Requests to one store; its methods may be called from threads."""

    def __init__(self, remote: Remote, timeout_s: float) -> None:
        self.remote = remote
        self.timeout_s = timeout_s
        self.pool: Executor = ThreadPoolExecutor(N_CONNECTIONS, thread_name_prefix="featstore-io")
        self._obstore = _obstore()
        self._store = self.store_below("")

    def store_below(self, prefix: str) -> Any:
        """Give obstore's own store below a prefix, for libraries that take one."""
        options: dict[str, Any] = dict(self.remote.options)
        is_plain = options.get("endpoint", self.remote.url).startswith("http:")
        # A quarter of the stated time for an attempt, half of it for its last request.
        request = timedelta(seconds=self.timeout_s / 8)
        given: dict[str, Any] = {
            "client_options": {
                "timeout": request,
                "connect_timeout": min(request, timedelta(seconds=5)),
                "allow_http": is_plain,
            },
            "retry_config": {
                "max_retries": 3,
                "retry_timeout": request,
                "backoff": {
                    "init_backoff": timedelta(seconds=0.05),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        }
        if options:
            given["config"] = options
        if self.remote.scheme == "file":
            given = {"mkdir": True}
        url = f"{self.remote.url}/{prefix}".rstrip("/")
        try:
            return self._obstore.store.from_url(url, **given)
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            raise InvalidInputError(
                f"{url} cannot be opened ({_sentence(error)}). {self._hint()}".rstrip()
            ) from error

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """Call a function for every item, as many at once as there may be requests."""
        return self.pool.map(function, items)

    def list_folder(self, prefix: str) -> tuple[list[Entry], list[str]]:
        """List the objects and the folders right below a prefix, "" being the store's root."""
        if self.remote.is_read_only:
            return self._list_page(prefix)
        found = self._retried(
            f"{prefix}/", lambda: self._obstore.list_with_delimiter(self._store, prefix or None)
        )
        return [_entry(about) for about in found["objects"]], list(found["common_prefixes"])

    def _list_page(self, prefix: str) -> tuple[list[Entry], list[str]]:
        """Take the links of the page that a web server shows for a folder."""
        try:
            # The slash is dropped on the way; servers redirect to the name with it.
            page = self._retried(f"{prefix}/", lambda: self._get(prefix, {})[0])
        except NotFoundError:
            return [], []
        files, folders = links(page.decode(errors="replace"))
        start = f"{prefix}/" if prefix else ""
        return (
            [Entry(key=start + name, size=-1, version="") for name in files],
            [start + name for name in folders],
        )

    def look(self, entry: Entry) -> Entry | None:
        """Ask for size and version where the listing did not tell; None if it is gone."""
        if entry.size >= 0:
            return entry
        try:
            about = self._retried(entry.key, lambda: self._obstore.head(self._store, entry.key))
        except NotFoundError:
            return None
        return _entry(about)

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Ask for the bytes of some objects; None where there is none."""
        looked = self.map(self.look, [Entry(key=key, size=-1, version="") for key in keys])
        return [None if entry is None else entry.size for entry in looked]

    def read(self, key: str) -> tuple[bytes, Entry]:
        """Read a whole small object, compared with the length and MD5 that the server names.

        Not every store names an MD5: a body that comes twice is taken for right.

        Raises:
            NotFoundError: There is none.
            StorageError: It could not be had within the stated time.
        """
        earlier: list[bytes] = []

        def get() -> tuple[bytes, Entry]:
            data, about = self._get(key, {})
            entry = _entry(about)
            named = entry.version.strip('"')
            found = hashlib.md5(data, usedforsecurity=False).hexdigest()
            if _MD5.fullmatch(named) and found != named and data not in earlier:
                earlier.append(data)
                raise _Short(f"{key} has another checksum than {named}")
            return data, Entry(key=key, size=len(data), version=entry.version)

        return self._retried(key, get)

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, int]:
        """Read the last bytes of an object; give its size too.

        Raises:
            NotFoundError: There is none.
        """
        if self.remote.scheme == "az":  # which knows no such range
            size = self._retried(key, lambda: self._obstore.head(self._store, key))["size"]
            start = max(0, size - n_bytes)
            return bytes(self.read_range(key, start, size)), size
        data, about = self._retried(
            key, lambda: self._get(key, {"range": {"suffix": n_bytes}}, n_bytes)
        )
        return data, about["size"]

    def read_range(self, key: str, start: int, stop: int) -> memoryview:
        """Read bytes `start` to `stop` of an object.

        Raises:
            NotFoundError: There is none.
            StorageError: They could not be had within the stated time.
        """

        def get() -> memoryview:
            data = self._obstore.get_range(self._store, key, start=start, end=stop)
            if len(data) != stop - start:
                raise _Short(f"{len(data)} of {stop - start} bytes came")
            return memoryview(data)

        return self._retried(key, get)

    def download(self, key: str, target: Path) -> None:
        """Copy an object to a local file, in parts that come at once.

        Raises:
            NotFoundError: There is none.
        """
        size = self._retried(key, lambda: self._obstore.head(self._store, key))["size"]
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def fetch(start: int) -> None:
            part = self.read_range(key, start, min(size, start + PART_BYTES))
            os.pwrite(handle, part, start)

        try:
            list(self.map(fetch, range(0, size, PART_BYTES)))
        finally:
            os.close(handle)

    def write(self, key: str, data: bytes, *, is_new: bool = False) -> str:
        """Write a small object; give its version.

        Args:
            key: Its name.
            data: Its bytes.
            is_new: There must be none of that name, but with these very bytes.

        Raises:
            ConflictError: There is one.
            StorageError: The store refused, or did not answer within the stated time.
        """
        self._check_writable()
        mode = "create" if is_new else "overwrite"

        def put() -> str:
            done = self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            return str(done.get("e_tag") or "")

        try:
            return self._retried(key, put)
        except self._obstore.exceptions.AlreadyExistsError:
            # Perhaps ours: an answer that was lost on its way makes the second attempt find it.
            there, entry = self.read(key)
        if there != data:
            raise ConflictError(
                f"Another process wrote {key} of {self.remote.url} first, and something else. "
                "Run this again: it goes on from what is there."
            )
        return entry.version

    def upload(self, key: str, path: Path) -> None:
        """Copy a local file to an object, which appears when it is whole.

        Raises:
            StorageError: The store refused, or did not answer within the stated time.
        """
        self._check_writable()
        self._retried(
            key,
            lambda: self._obstore.put(
                self._store, key, path, chunk_size=PART_BYTES, max_concurrency=_UPLOADS
            ),
            extra_s=path.stat().st_size / _SLOWEST,
        )

    def delete(self, key: str) -> None:
        """Delete an object, if there is one."""
        self._check_writable()
        try:
            self._retried(key, lambda: self._obstore.delete(self._store, key))
        except NotFoundError:
            return

    def _get(self, key: str, options: Mapping[str, Any], most: int | None = None) -> Any:
        result = self._obstore.get(self._store, key, options=dict(options))
        data, about = bytes(result.bytes()), result.meta
        wanted = about["size"] if most is None else min(most, about["size"])
        if len(data) != wanted:
            raise _Short(f"{len(data)} of {wanted} bytes came")
        return data, about

    def _retried(self, key: str, call: Callable[[], T], *, extra_s: float = 0.0) -> T:
        """Call until it works, the reason lasts, or the time is over."""
        known = self._obstore.exceptions
        last_start = time.monotonic() + 0.75 * self.timeout_s + extra_s
        pause_s = 0.1
        while True:
            try:
                return call()
            except (FileNotFoundError, known.NotFoundError):
                raise NotFoundError(f"No object {key} in {self.remote.url}.") from None
            except known.AlreadyExistsError:
                raise
            except (known.PermissionDeniedError, known.UnauthenticatedError) as error:
                raise self._refused(key) from error
            except (_Short, known.BaseError, OSError) as error:
                problem = error
                if _REFUSED.search(str(error)):
                    raise self._refused(key) from error
                if _LASTING.search(str(error)):
                    raise self._failed(key, error, "Check the address") from error
            wait = random.uniform(pause_s / 2, pause_s)
            if time.monotonic() + wait > last_start:
                tried = f"Tried for up to {self.timeout_s:g} s; check the network"
                raise self._failed(key, problem, tried) from problem
            time.sleep(wait)
            pause_s = min(2 * pause_s, 5.0)

    def _failed(self, key: str, error: Exception, advice: str) -> StorageError:
        return StorageError(
            f"{self.remote.url} does not give or take {key.strip('/') or 'its list'} "
            f"({_sentence(error)}). {advice}, then run this again: what is committed is safe."
        )

    def _refused(self, key: str) -> StorageError:
        text = f"{self.remote.url} does not let this process at {key.strip('/') or 'its list'}."
        return StorageError(f"{text} {self._hint()}".rstrip())

    def _check_writable(self) -> None:
        if self.remote.is_read_only:
            raise InvalidInputError(
                f"{self.remote.url} can only be read. Write to s3://, gs://, az:// or file://."
            )

    def _hint(self) -> str:
        return _HINTS.get(self.remote.scheme, "")


def _entry(about: Mapping[str, Any]) -> Entry:
    version = about.get("e_tag") or str(about.get("last_modified") or "")
    return Entry(key=about["path"], size=int(about["size"]), version=str(version))


def _sentence(error: Exception) -> str:
    """Give the point of a message that may be pages of debugging output."""
    answer = _ANSWER.search(str(error))
    if answer is not None:
        return " ".join(filter(None, [answer[1].strip(), answer[2]]))
    text, _, debug = str(error).partition("Debug source")
    point = " ".join(text.split()).rpartition(" - ")[2][:240]
    causes = _CAUSE.findall(debug)
    return f"{point}: {causes[-1]}" if causes else point


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise InvalidInputError(
            "Stores behind a URL need obstore. Install it: pip install 'featstore-heads[cloud]'."
        ) from error
    return obstore


@lru_cache(maxsize=32)
def _client(
    remote_json: tuple[str, tuple[tuple[str, str], ...]], limit_s: float, _pid: int
) -> Client:
    url, options = remote_json
    return Client(Remote(url=url, options=dict(options)), limit_s)


def client_of(remote: Remote) -> Client:
    """Give this process's client for a store; its connections are shared."""
    told = (remote.url, tuple(sorted(remote.options.items())))
    return _client(told, timeout_s(), os.getpid())

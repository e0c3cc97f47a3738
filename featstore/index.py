"""The index: a DuckDB file derived from the store's files, for SQL. Safe to delete.

The files are the truth. What is new, changed or gone among them is folded into a copy of the
index, which then takes its place: readers keep the snapshot they opened, and no process ever
holds the index open for writing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from featstore.errors import ConflictError, InvalidInputError, StorageError
from featstore.files import PARTIAL, exclusive, fsync_path
from featstore.hashing import short_key
from featstore.sql.fold import Fold
from featstore.sql.guard import check_query, check_where, sentence
from featstore.sql.scan import Files, Scan, Vanished, quick_digest, settled_scan
from featstore.store import StoreFolder, open_folder

_SCHEMA = (Path(__file__).parent / "sql" / "schema.sql").read_text()
_VERSION = short_key(_SCHEMA)
_LOCK_WAIT_S = 600.0
_SAMPLES_TIMEOUT_S = 600.0
_SPARSE = 64  # row numbers of more than so many times their count are sorted, not marked
_ATTEMPTS = 10  # at a list of files of which none is removed before it is read
_FOLD_MEMORY = "4GB"
_SETTINGS = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
}
_DAMAGE = {  # what DuckDB raises where a block of its file is wrong
    duckdb.Error,
    duckdb.FatalException,
    duckdb.InternalException,
    duckdb.IOException,
    duckdb.SerializationException,
}

_elsewhere_path: Path | None = None
_elsewhere_pid = 0
_elsewhere_lock = threading.Lock()


def refresh(store_path: str | Path) -> Path:
    """Bring the index up to date; cheap if it is.

    Returns:
        Path of an index that holds what the files say now. It lies outside a store that cannot
        be written, and is deleted when this process ends.

    Raises:
        NotFoundError: There is no store.
        FormatError: One of the store's files is damaged.
    """
    store = open_folder(Path(store_path))
    con = _open_current(store.index_path, quick_digest(store))
    if con is None:
        return _update(store, is_fresh=False)
    con.close()
    return store.index_path


def rebuild(store_path: str | Path) -> Path:
    """Make the index anew from the files; see `refresh`."""
    return _update(open_folder(Path(store_path)), is_fresh=True)


def connect(store_path: str | Path) -> duckdb.DuckDBPyConnection:
    """Open the index, up to date, for reading; the caller closes it.

    The connection keeps what it sees, whatever is folded later.

    Raises:
        NotFoundError: There is no store.
        FormatError: One of the store's files is damaged.
    """
    store = open_folder(Path(store_path))
    con = _open_current(store.index_path, quick_digest(store))
    return con or _attach(_update(store, is_fresh=False), is_locked=True)


def query(
    store_path: str | Path,
    sql: str,
    params: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 60.0,
) -> pa.Table:
    """Answer one read-only SQL statement over the index.

    Args:
        store_path: Store.
        sql: One select, with, describe, summarize, show or explain statement.
        params: Values of its ``$name`` parameters.
        timeout_s: How long it may take.

    Raises:
        InvalidInputError: The statement is not one of these, DuckDB refuses it, or it takes
            longer.
    """

    def ask(con: duckdb.DuckDBPyConnection) -> pa.Table:
        check_query(con, sql)
        return _answer(con, sql, params, timeout_s)

    return _ask(store_path, ask)


def peek(
    store_path: str | Path, questions: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[pa.Table] | None:
    """Answer questions from the index as it is, behind the files or not, and fold nothing.

    Returns:
        A table each, all of one state of the index, where temporary tables may be made; None if
        there is no index that can be read.
    """
    con, _ = _open_folded(open_folder(Path(store_path)).index_path)
    if con is None:
        return None
    with contextlib.closing(con):
        try:
            answers = [con.sql(sql, params=dict(values) or None) for sql, values in questions]
            return [answer.to_arrow_table() for answer in answers]
        except duckdb.Error:
            return None


def samples(
    store_path: str | Path, where: str | None = None, feature_set: str | None = None
) -> pa.Table:
    """List committed rows joined with their items, ordered by row, item and split.

    Args:
        store_path: Store.
        where: One boolean SQL expression over the columns of the view `samples`.
        feature_set: Key; None lists the rows of every feature set.

    Raises:
        InvalidInputError: `where` is something else.
    """
    order = '"row", item, split, feature_set'
    return _ask_samples(store_path, "*", where, feature_set, order)


def sample_rows(store_path: str | Path, where: str | None, feature_set: str) -> np.ndarray:
    """List the rows of one feature set in `samples`, each once, ascending: int64.

    Many times faster than `samples` where there are many rows.

    Raises:
        InvalidInputError: `where` is not one boolean SQL expression.
    """
    table = _ask_samples(store_path, '"row"', where, feature_set, None)
    return _ascending(table["row"].to_numpy())


def _ascending(rows: np.ndarray) -> np.ndarray:
    """Sort row numbers and drop repeated ones; rows lie dense, so a mark for each is enough."""
    if not len(rows) or rows.max() > _SPARSE * len(rows):
        return np.unique(rows).astype(np.int64)
    marks = np.zeros(int(rows.max()) + 1, bool)
    marks[rows] = True
    return np.flatnonzero(marks).astype(np.int64, copy=False)


def _ask_samples(
    store_path: str | Path,
    columns: str,
    where: str | None,
    feature_set: str | None,
    order: str | None,
) -> pa.Table:
    def ask(con: duckdb.DuckDBPyConnection) -> pa.Table:
        conditions = ["$feature_set is null or feature_set = $feature_set"]
        if where is not None:
            check_where(con, where)
            conditions.append(where)
        condition = " and ".join(f"({text}\n)" for text in conditions)
        sql = f"select {columns} from samples where {condition}"
        sql = sql if order is None else f"{sql} order by {order}"
        return _answer(con, sql, {"feature_set": feature_set}, _SAMPLES_TIMEOUT_S)

    return _ask(store_path, ask)


def _ask(store_path: str | Path, ask: Callable[[duckdb.DuckDBPyConnection], pa.Table]) -> pa.Table:
    """Ask the index; make it anew if it turns out to be damaged inside, and ask again."""
    try:
        with contextlib.closing(connect(store_path)) as con:
            return ask(con)
    except duckdb.Error:
        path = rebuild(store_path)
    try:
        with contextlib.closing(_attach(path, is_locked=True)) as con:
            return ask(con)
    except duckdb.Error as error:
        raise InvalidInputError(sentence(error)) from error


def _answer(
    con: duckdb.DuckDBPyConnection, sql: str, params: Mapping[str, Any] | None, timeout_s: float
) -> pa.Table:
    def stop() -> None:
        with contextlib.suppress(duckdb.Error):  # closed meanwhile
            con.interrupt()

    timer = threading.Timer(timeout_s, stop)
    timer.start()
    try:
        return con.sql(sql, params=dict(params) if params else None).to_arrow_table()
    except duckdb.InterruptException as error:
        raise InvalidInputError(
            f"The query took longer than {timeout_s:g} s and was stopped. Ask for less, or allow "
            "more time."
        ) from error
    except duckdb.Error as error:
        if type(error) in _DAMAGE:
            raise
        raise InvalidInputError(sentence(error)) from error
    except pa.ArrowException as error:
        raise InvalidInputError(f"The answer cannot be given: {error}") from error
    finally:
        timer.cancel()
        timer.join()


def _attach(path: Path, *, is_locked: bool) -> duckdb.DuckDBPyConnection:
    """Open an index file.

    It is attached to a database in memory: opened by name, DuckDB would give the connections of
    one process the file that the first of them found there, though it was replaced since.
    """
    # Made by DuckDB when memory runs short, and removed again. DuckDB lets queries read whatever
    # lies below it, so that nothing else may.
    spill = Path(tempfile.gettempdir()) / f"featstore-spill-{os.getpid()}-{secrets.token_hex(4)}"
    con = duckdb.connect(":memory:", config={**_SETTINGS, "temp_directory": str(spill)})
    try:
        mode = ", read_only" if is_locked else ""
        name = str(path.absolute()).replace("'", "''")
        con.execute(f"attach '{name}' as store (type duckdb{mode})")
        con.execute("use store")
        if is_locked:
            con.execute("set enable_external_access = false")
            con.execute("set lock_configuration = true")
    except BaseException:
        con.close()
        raise
    return con


def _open_current(path: Path, digest: str) -> duckdb.DuckDBPyConnection | None:
    """Open an index if it holds just the files of this digest."""
    con, folded = _open_folded(path)
    if con is not None and folded != digest:
        con.close()
        return None
    return con


def _open_folded(path: Path) -> tuple[duckdb.DuckDBPyConnection | None, str]:
    """Open an index and give the digest of its files; None if it is missing, bad or outdated."""
    if not path.is_file():
        return None, ""
    con = None
    try:
        con = _attach(path, is_locked=True)
        ((version, digest),) = con.execute('select "schema", files from about').fetchall()
        if version == _VERSION:
            return con, digest
    except (duckdb.Error, ValueError):
        pass  # damaged, or not an index: it is derived, so it is made anew
    if con is not None:
        con.close()
    return None, ""


def _folded(path: Path) -> Files | None:
    """Give the files that an index holds; None if it is missing, damaged or outdated."""
    con, _ = _open_folded(path)
    if con is None:
        return None
    with contextlib.closing(con):
        try:
            lines = con.execute("select path, mtime_ns, size from folded").fetchall()
        except duckdb.Error:
            return None
    return {path: (mtime_ns, size) for path, mtime_ns, size in lines}


def _update(store: StoreFolder, *, is_fresh: bool) -> Path:
    if store.is_writable:
        lock = store.locks_path / "index.lock"
        # Where the disk refuses (full, read-only in part), the index goes elsewhere.
        with contextlib.suppress(OSError):
            return _update_at(store, store.index_path, lock, is_fresh=is_fresh)
    folder = _elsewhere() / short_key(str(store.path.resolve()))
    # Temporary folders are swept: a process that runs for weeks makes its own again.
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.duckdb"
    with _elsewhere_lock:
        if not is_fresh and not path.exists() and _folded(store.index_path) is not None:
            shutil.copyfile(store.index_path, path)
    return _update_at(store, path, folder / "index.lock", is_fresh=is_fresh)


def _elsewhere() -> Path:
    """Give this process's own folder for the indexes of stores that it cannot write."""
    global _elsewhere_path, _elsewhere_pid
    with _elsewhere_lock:
        if _elsewhere_path is None or _elsewhere_pid != os.getpid():
            _elsewhere_path = Path(tempfile.mkdtemp(prefix="featstore-index-"))
            _elsewhere_pid = os.getpid()
            atexit.register(_remove, _elsewhere_path, _elsewhere_pid)
        return _elsewhere_path


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked child
        shutil.rmtree(path, ignore_errors=True)


def _update_at(store: StoreFolder, path: Path, lock: Path, *, is_fresh: bool) -> Path:
    with exclusive(lock, purpose="refreshing the index", timeout_s=_LOCK_WAIT_S):
        for left in path.parent.glob(f"{path.name}.*{PARTIAL}*"):
            left.unlink(missing_ok=True)
        for _ in range(_ATTEMPTS):
            found = settled_scan(store)
            folded = None if is_fresh else _folded(path)
            if folded == found.files:
                return path
            try:
                _replace(store, path, found, folded)
            except Vanished:
                continue
            return path
    raise ConflictError(f"The files of {store.path} change all the time. Run this again later.")


def _replace(store: StoreFolder, path: Path, found: Scan, folded: Files | None) -> None:
    """Fold into a copy and put it in the index's place."""
    copy = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        if folded is None or not _fold_into_copy(store, path, copy, found, folded):
            copy.unlink(missing_ok=True)
            _write(store, copy, found, None)
        fsync_path(copy)
        # Nobody of ours leaves a log; a stranger's would not fit the new file.
        path.with_name(f"{path.name}.wal").unlink(missing_ok=True)
        copy.replace(path)
        fsync_path(path.parent)
    except duckdb.Error as error:
        raise StorageError(f"Could not write {path}: {sentence(error)}") from error
    finally:
        copy.unlink(missing_ok=True)
        copy.with_name(f"{copy.name}.wal").unlink(missing_ok=True)


def _fold_into_copy(store: StoreFolder, path: Path, copy: Path, found: Scan, folded: Files) -> bool:
    """Fold what changed into a copy of the index; False if the index is damaged inside."""
    try:
        shutil.copyfile(path, copy)
        _write(store, copy, found, folded)
    except (duckdb.Error, FileNotFoundError):
        return False
    return True


def _write(store: StoreFolder, copy: Path, found: Scan, folded: Files | None) -> None:
    with contextlib.closing(_attach(copy, is_locked=False)) as con:
        con.execute(f"set memory_limit = '{_FOLD_MEMORY}'")  # beyond it, DuckDB uses the disk
        con.execute("begin")
        if folded is None:
            con.execute(_SCHEMA)
        con.execute("delete from about")
        about = {"version": _VERSION, "digest": found.digest}
        con.execute("insert into about values ($version, $digest)", about)
        Fold(con, store, found.files, folded or {}).run()
        con.execute("commit")
        con.execute("checkpoint")

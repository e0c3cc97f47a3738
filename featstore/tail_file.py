"""``tail.safetensors``: the last blocks of a backbone, stored once with a feature set.

The feature set's attributes list the contents that the file may have, each with its checksum:
usually one. While a larger tail takes the place of a smaller one both are listed, so that a
process killed in between leaves a file that one of them describes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from featstore.commands import extract_command
from featstore.errors import FormatError, NotFoundError, invalid
from featstore.files import write_bytes
from featstore.hashing import canonical_json
from featstore.store import FeatureSetFolder, read_attributes, write_attributes
from featstore.tail import TailSpec, TailWeights

TAIL_FILE = "tail.safetensors"
_Record = Mapping[str, Any]


def write_tail(folder: FeatureSetFolder, tail: TailWeights) -> None:
    """Store a tail, unless one of as many blocks is there already.

    Call it under the feature set's writer lock.

    Raises:
        StorageError: The disk refused; the tail that was there still is.
    """
    stored = _whole(folder.path, _records(folder.path))
    path = folder.path / TAIL_FILE
    if stored is not None and _spec(stored).n_blocks >= tail.spec.n_blocks:
        _record(folder.path, [stored])
        return
    data = _to_bytes(tail)
    new = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "spec": tail.spec.to_json(),
    }
    _record(folder.path, [stored, new])
    write_bytes(path, data)
    _record(folder.path, [new])


def find_tail(folder: FeatureSetFolder) -> TailSpec | None:
    """Tell which tail is stored, without reading its weights; None: there is none."""
    record = _likely(folder.path, _records(folder.path))
    return None if record is None else _spec(record)


def check_tail(folder: FeatureSetFolder) -> None:
    """Compare the stored tail, if there is one, with its checksum.

    Raises:
        FormatError: It is missing, damaged or another's.
    """
    _current(folder)


def read_tail(folder: FeatureSetFolder, n_blocks: int) -> TailWeights:
    """Read the last blocks of a backbone, as they are stored with a feature set.

    Args:
        folder: Feature set.
        n_blocks: How many blocks.

    Raises:
        NotFoundError: No tail is stored, or a shorter one; the message has the command that adds
            it.
        FormatError: The file is damaged.
    """
    if n_blocks < 1:
        raise invalid("n_blocks", n_blocks, "at least 1")
    record = _current(folder)
    spec = None if record is None else _spec(record)
    if spec is None or spec.n_blocks < n_blocks:
        raise _too_short(folder, 0 if spec is None else spec.n_blocks, n_blocks)
    tensors = _tensors(folder.path / TAIL_FILE, spec.n_blocks - n_blocks)
    return TailWeights(spec=spec.last(n_blocks), tensors=tensors)


def _current(folder: FeatureSetFolder) -> _Record | None:
    """Choose the content that the file has; None: there is no tail.

    Raises:
        FormatError: It has none of those that are listed.
    """
    # Twice: a larger tail may take the place of the one that was listed a moment ago.
    for _ in range(2):
        records = _records(folder.path)
        if _likely(folder.path, records) is None:
            return None
        record = _whole(folder.path, records)
        if record is not None:
            return record
    raise _damaged(folder)


def _tensors(path: Path, n_left_out: int) -> dict[str, np.ndarray]:
    """Read all tensors but those of the first blocks; the others count from 0."""
    tensors = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            kind, _, rest = name.partition(".")
            if kind == "blocks":
                number, _, inner = rest.partition(".")
                if int(number) < n_left_out:
                    continue
                tensors[f"blocks.{int(number) - n_left_out}.{inner}"] = file.get_tensor(name)
            else:
                tensors[name] = file.get_tensor(name)
    return tensors


def _to_bytes(tail: TailWeights) -> bytes:
    tensors = {name: np.ascontiguousarray(array) for name, array in tail.tensors.items()}
    # One entry: safetensors writes several in an order that changes from process to process.
    metadata = {"tail": canonical_json(tail.spec.to_json())}
    data: bytes = safetensors.numpy.save(tensors, metadata)
    return data


def _records(path: Path) -> list[_Record | None]:
    """Read, afresh, what the file may hold; None stands for no file.

    Raises:
        FormatError: The attributes list something else.
    """
    records = read_attributes(path).get("tail", [])
    try:
        if all(one is None or (one["bytes"] >= 0 and one["sha256"]) for one in records):
            return list(records)
    except (KeyError, TypeError):
        pass
    raise FormatError(f"{path}/zarr.json describes no tail. Restore it from a copy.")


def _record(path: Path, records: list[_Record | None]) -> None:
    attributes = read_attributes(path)
    if attributes.get("tail") != records:
        write_attributes(path, {**attributes, "tail": records})


def _likely(path: Path, records: list[_Record | None]) -> _Record | None:
    """Choose the content that the file's size speaks for; None: there is no tail."""
    try:
        size = (path / TAIL_FILE).stat().st_size
    except FileNotFoundError:
        size = None
    if size is None and (not records or None in records):
        return None
    known = [one for one in records if one is not None]
    return next((one for one in known if one["bytes"] == size), known[-1] if known else None)


def _whole(path: Path, records: list[_Record | None]) -> _Record | None:
    """Choose the content whose checksum the file has; None: it has none of them."""
    if not records:
        return None
    try:
        with (path / TAIL_FILE).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    return next((one for one in records if one is not None and one["sha256"] == found), None)


def _spec(record: _Record) -> TailSpec:
    return TailSpec.from_json(record["spec"])


def _damaged(folder: FeatureSetFolder) -> FormatError:
    spec = find_tail(folder)
    assert spec is not None
    command = extract_command(folder, taps=[spec.input_tap], tail=spec.n_blocks)
    return FormatError(
        f"{folder.path / TAIL_FILE} is missing or damaged. Write it anew: `{command}`."
    )


def _too_short(folder: FeatureSetFolder, stored: int, wanted: int) -> NotFoundError:
    has = f"a tail of {stored}" if stored else "no tail"
    needed = "1 block is" if wanted == 1 else f"{wanted} blocks are"
    text = f"Feature set {folder.key} has {has}, and {needed} needed."
    if folder.plan is None:
        return NotFoundError(f"{text} Its features were imported: choose one with a backbone.")
    about = folder.attributes["backbone"]
    depth = int(about.get("depth", 0))
    if about.get("unit") != "block" or wanted >= depth:
        return NotFoundError(f"{text} Its backbone cannot have it: choose fewer, or another one.")
    command = extract_command(folder, taps=[f"block:{depth - wanted - 1}"], tail=wanted)
    return NotFoundError(f"{text} Add it, what is stored stays: `{command}`.")

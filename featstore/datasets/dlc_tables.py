"""Tables of DeepLabCut: labels of the images of one video, as CSV or as HDF5 of pandas."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np

from featstore.datasets.hdf5 import read_arrays
from featstore.errors import InvalidInputError

SINGLE = "single"
"""The individual that carries body parts of which there is one in the image, such as a corner."""

_GROUP = "df_with_missing"
_LEVELS = ("individuals", "bodyparts", "coords")

Place = tuple[float, float]
Marks = Mapping[str, Mapping[str, Place]]
"""Individual to body part to x and y as the table has them; what is not marked is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelTable:
    """What one table says. Without individuals, "" stands for the animal."""

    path: Path
    individuals: tuple[str, ...]
    bodyparts: Mapping[str, tuple[str, ...]]  # of each individual, in the table's order
    rows: Mapping[str, Marks]  # by the image's file name


def read_label_table(path: Path) -> LabelTable:
    """Read ``CollectedData_*.csv`` or ``.h5``.

    Raises:
        InvalidInputError: The file is none of DeepLabCut's tables, or a cell in it is no number;
            the message names the line.
    """
    read = _read_csv if path.suffix == ".csv" else _read_hdf5
    columns, rows = read(path)
    return _table(path, columns, rows)


Columns = list[tuple[str, str, str]]
"""Individual, body part and "x" or "y"."""


def _read_csv(path: Path) -> tuple[Columns, list[tuple[str, list[float]]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [(number, cells) for number, cells in enumerate(csv.reader(file), 1) if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{path} cannot be read as CSV ({error}).") from error
    header: dict[str, list[str]] = {}
    while lines and "coords" not in header:
        _, cells = lines.pop(0)
        header[cells[0].strip()] = cells
    if "coords" not in header or "bodyparts" not in header:
        raise _no_table(path, ", ".join(list(header)[:4]) or "nothing")
    n_index = next((n for n, cell in enumerate(header["coords"]) if cell in ("x", "y")), 1)
    columns = _columns(path, {name: cells[n_index:] for name, cells in header.items()})
    return columns, [
        (cells[n_index - 1], _numbers(cells[n_index:], len(columns), f"Line {number} of {path}"))
        for number, cells in lines
    ]


def _columns(path: Path, header: Mapping[str, Sequence[str]]) -> Columns:
    bodyparts, coords = header["bodyparts"], header["coords"]
    individuals = header.get("individuals") or [""] * len(coords)
    if not len(individuals) == len(bodyparts) == len(coords):
        raise _no_table(path, "rows of different lengths at its head")
    return list(zip(individuals, bodyparts, coords, strict=True))


def _no_table(path: Path, got: str) -> InvalidInputError:
    return InvalidInputError(
        f"{path} must be a table of DeepLabCut, headed by scorer, bodyparts and coords. Got {got}; "
        "save the labels in DeepLabCut again."
    )


def _numbers(cells: Sequence[str], n_columns: int, source: str) -> list[float]:
    if len(cells) != n_columns:
        raise InvalidInputError(
            f"{source} must have {n_columns} numbers, as its header has. Got {len(cells)}."
        )
    try:
        return [float(cell) if cell.strip() else math.nan for cell in cells]
    except ValueError as error:
        raise InvalidInputError(f"{source} must hold numbers or nothing ({error}).") from error


def _read_hdf5(path: Path) -> tuple[Columns, list[tuple[str, list[float]]]]:
    """Read the fixed format of pandas, whose axes and blocks are plain arrays."""
    arrays = read_arrays(path, _GROUP)
    try:
        names = _axis(arrays, "axis0")
        files = [labels[-1] for labels in _axis(arrays, "axis1")]
        values = np.full((len(files), len(names)), np.nan)
        column_of = {name: number for number, name in enumerate(names)}
        blocks = sorted(name.removesuffix("_values") for name in arrays if name[-7:] == "_values")
        for block in blocks:
            numbers = [column_of[name] for name in _axis(arrays, f"{block}_items")]
            values[:, numbers] = arrays[f"{block}_values"]
        columns = [_column(name) for name in names]
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InvalidInputError(
            f"{path} must hold {_GROUP} in the fixed format of pandas ({type(error).__name__}: "
            f"{error}). Save it as CSV in DeepLabCut, beside it."
        ) from error
    return columns, list(zip(files, values.tolist(), strict=True))


def _axis(arrays: Mapping[str, np.ndarray], name: str) -> list[tuple[str, ...]]:
    """Read an index of pandas: plain values, or codes into the values of each level."""
    if name in arrays:
        return [(value.decode(),) for value in arrays[name].tolist()]
    levels: list[list[str]] = []
    while f"{name}_level{len(levels)}" in arrays:
        known = arrays[f"{name}_level{len(levels)}"]
        codes = arrays[f"{name}_label{len(levels)}"]
        levels.append([value.decode() for value in known[codes].tolist()])
    if not levels:
        raise KeyError(name)
    return list(zip(*levels, strict=True))


def _column(name: Sequence[str]) -> tuple[str, str, str]:
    """Name a column by its last levels: after the scorer there may be an individual."""
    if len(name) not in (3, 4):
        raise ValueError(f"{len(name)} levels of columns")
    return (name[1] if len(name) == 4 else "", name[-2], name[-1])


def _table(path: Path, columns: Columns, rows: list[tuple[str, list[float]]]) -> LabelTable:
    found: dict[str, dict[str, dict[str, Place]]] = {}
    for place, numbers in rows:
        file_name = PureWindowsPath(place).name  # takes both kinds of slashes
        if file_name in found:
            raise InvalidInputError(
                f"{path} must list each image once. Got {file_name} twice; delete one row."
            )
        found[file_name] = _marks(columns, numbers)
    parts: dict[str, dict[str, None]] = {}
    for individual, bodypart, _ in columns:
        parts.setdefault(individual, {})[bodypart] = None
    return LabelTable(
        path=path,
        individuals=tuple(parts),
        bodyparts={individual: tuple(named) for individual, named in parts.items()},
        rows=found,
    )


def _marks(columns: Columns, numbers: Sequence[float]) -> dict[str, dict[str, Place]]:
    cells = dict(zip(columns, numbers, strict=True))
    found: dict[str, dict[str, Place]] = {}
    for individual, bodypart, axis in columns:
        place = (cells[individual, bodypart, "x"], cells.get((individual, bodypart, "y"), math.nan))
        if axis == "x" and all(map(math.isfinite, place)):
            found.setdefault(individual, {})[bodypart] = place
    return found

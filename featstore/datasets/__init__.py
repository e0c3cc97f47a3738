"""Readers of data sets, and the one way to open them: ``[NAME=]FORMAT:ARGUMENT``.

Importing this files the readers we ship; other packages add theirs through the entry point group
``featstore.readers``.
"""

from __future__ import annotations

import re
from pathlib import Path

from featstore.datasets import ade20k as _ade20k  # noqa: F401
from featstore.datasets import ap10k as _ap10k  # noqa: F401
from featstore.datasets import bsds as _bsds  # noqa: F401
from featstore.datasets import cityscapes as _cityscapes  # noqa: F401
from featstore.datasets import coco as _coco  # noqa: F401
from featstore.datasets import creatures as _creatures  # noqa: F401
from featstore.datasets import dlc as _dlc  # noqa: F401
from featstore.datasets import features as _features  # noqa: F401
from featstore.datasets import folder as _folder  # noqa: F401
from featstore.datasets import manifest as _manifest  # noqa: F401
from featstore.datasets import nyu as _nyu  # noqa: F401
from featstore.datasets import nyu_hf as _nyu_hf  # noqa: F401
from featstore.datasets import rooms as _rooms  # noqa: F401
from featstore.datasets import sleap as _sleap  # noqa: F401
from featstore.datasets import voc as _voc  # noqa: F401
from featstore.datasets.common import READERS, ReaderFactory, parse_argument
from featstore.errors import invalid
from featstore.types import Reader

__all__ = ["READERS", "ReaderFactory", "default_name", "open_dataset"]

_SPEC = re.compile(r"(?:([^=:/\\,]+)=)?([A-Za-z][A-Za-z0-9_.]*):(.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def open_dataset(text: str) -> Reader:
    """Open a data set.

    Args:
        text: ``[NAME=]FORMAT:ARGUMENT``, like "nyu:/data/nyu" or "toys=rooms:n=50,seed=1". The
            name is that of the file or folder where none is given.

    Raises:
        InvalidInputError: `text` does not parse, or what it leads to is missing or empty.
        NotFoundError: The format or an option is unknown; the message offers the nearest.
    """
    name, full_name, argument = _parse_spec(text)
    if name is None:
        name = default_name(full_name.rpartition(".v")[0], argument)
    elif not _NAME.fullmatch(name):
        raise invalid("name", name, "letters, digits, '.', '_' and '-', a letter or digit first")
    return READERS[full_name](argument, name=name)


def format_of(text: str) -> str:
    """Give the format that ``[NAME=]FORMAT:ARGUMENT`` names, without its version.

    Raises:
        InvalidInputError: `text` does not parse.
        NotFoundError: The format is unknown.
    """
    return _parse_spec(text)[1].rpartition(".v")[0]


def _parse_spec(text: str) -> tuple[str | None, str, str]:
    """Give the name, if there is one, the format with its version, and the argument."""
    match = _SPEC.fullmatch(text)
    if match is None:
        known = ", ".join(sorted({name.rpartition(".v")[0] for name in READERS}))
        raise invalid("data", text, "[NAME=]FORMAT:PATH", hint=f"Formats: {known}.")
    name, reader, argument = match.groups()
    return name, READERS.full_name(reader), argument


def default_name(reader: str, argument: str) -> str:
    """Name a data set after its file or folder, or after its format where it has no path."""
    path = parse_argument(argument).path
    if not path:
        return reader
    place = Path(path).expanduser().absolute()
    plain = place.stem if place.is_file() else place.name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", plain).lstrip("._-") or reader

"""What can go wrong, grouped by what the caller can do about it.

FeatstoreError
|-- InvalidInputError   (also a ValueError)  fix the argument or the file
|-- NotFoundError       (also a KeyError)    fix the name, or create the thing first
|-- ConflictError                            another writer got there first: wait or choose
|-- StorageError        (also an OSError)    the disk refused: full, read-only, no permission
`-- FormatError                              the bytes on disk are not what FORMAT.md says
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeatstoreError(Exception):
    """Base of every error raised on purpose; anything else is a bug."""


class InvalidInputError(FeatstoreError, ValueError):
    """An argument or a file the user gave is not acceptable."""


class BadImageError(InvalidInputError):
    """One image cannot be decoded or used; the others can."""


class NotFoundError(FeatstoreError, KeyError):
    """A name, row or path does not exist."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class ConflictError(FeatstoreError):
    """Another process holds or changed what this one was about to write."""


class StorageError(FeatstoreError, OSError):
    """The disk refused a write or a read; everything committed before it stays good."""


class ExportError(FeatstoreError):
    """A head cannot be written for other programs; the run itself is as good as before."""


class FormatError(FeatstoreError):
    """Stored bytes contradict FORMAT.md: damage, or a newer format version."""


def invalid(name: str, value: object, expected: str, *, hint: str = "") -> InvalidInputError:
    """Build the one message shape of a rejected argument: what, expected, got, and a way out."""
    return InvalidInputError(f"`{name}` must be {expected}. Got {value!r}. {hint}".rstrip())


def not_found(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> NotFoundError:
    """Build the one message shape of an unknown name: nearest match first, then all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean {nearest[0]!r}?" if nearest else ""
    message = f"Unknown {kind} {name!r}.{guess} Known: {', '.join(names) or 'none'}. {hint}"
    return NotFoundError(message.rstrip())

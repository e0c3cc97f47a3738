"""Names to factories, open to third-party packages through entry points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from featstore.errors import invalid, not_found

T = TypeVar("T")

_NAME = re.compile(r"[a-z][a-z0-9_]*\.v[1-9][0-9]*")


def short_name(name: str) -> str:
    """Leave the version out of a registered name; a name without one stays."""
    return name.rpartition(".v")[0] or name


class Registry(Mapping[str, T]):
    """Names to factories: filled by a decorator or an entry point, read like a mapping.

    Names end in ``.vN`` because they are written into stores and checkpoints: an entry that
    starts to behave differently takes the next version, and the old entry stays as it was.
    A look-up without a version (``deap``) means the newest version of that name.
    """

    def __init__(self, kind: str, *, group: str) -> None:
        self._kind = kind
        self._group = group
        self._entries: dict[str, T] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a factory to file it under `name`; a second use of a name is an error."""
        if not _NAME.fullmatch(name):
            raise invalid("name", name, "lower_snake_case with a version, like 'linear.v1'")
        if name in self._entries:
            raise invalid("name", name, f"a {self._kind} name that is not taken")

        def add(factory: T) -> T:
            self._entries[name] = factory
            return factory

        return add

    def full_name(self, name: str) -> str:
        """Give the versioned name for `name`, which may lack its version."""
        self._load_entry_points()
        if name in self._entries:
            return name
        versions = [known for known in self._entries if known.rpartition(".v")[0] == name]
        if not versions:
            short = {known.rpartition(".v")[0] for known in self._entries}
            raise not_found(self._kind, name, self._entries if ".v" in name else short)
        return max(versions, key=lambda known: int(known.rpartition(".v")[2]))

    def __getitem__(self, name: str) -> T:
        return self._entries[self.full_name(name)]

    def __contains__(self, name: object) -> bool:
        self._load_entry_points()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load_entry_points()
        return len(self._entries)

    def _load_entry_points(self) -> None:
        """Import third-party entries once; their modules call `register`."""
        if not self._is_loaded:
            self._is_loaded = True  # first, so that an entry that reads the registry ends
            for entry in entry_points(group=self._group):
                entry.load()

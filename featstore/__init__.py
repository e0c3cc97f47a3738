"""featstore: run a frozen vision backbone once, keep its activations, train heads from them.

Public names, loaded when they are first used: `open`, `create`, `extract`, `Store`,
`FeatureSet`, and the errors in `featstore.errors`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from featstore.version import __version__

if TYPE_CHECKING:
    from featstore.api import FeatureSet, Store, create, open  # noqa: A004
    from featstore.extract import extract
    from featstore.plan import RunOptions

_HOMES = {
    "FeatureSet": "featstore.api",
    "RunOptions": "featstore.plan",
    "Store": "featstore.api",
    "create": "featstore.api",
    "extract": "featstore.extract",
    "open": "featstore.api",
}

__all__ = ["FeatureSet", "RunOptions", "Store", "__version__", "create", "extract", "open"]


class _Package(ModuleType):
    """Keeps `featstore.extract` the function: importing its file would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import featstore` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'featstore' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

"""heads: train tiny heads on stored activations, measure them, use them. No backbone is needed.

Public names, loaded when they are first used: `train`, `train_many`, `evaluate`,
`predict`, `export`, `load`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heads.evaluate import evaluate
    from heads.export import export
    from heads.model import load
    from heads.predict import predict
    from heads.train import train, train_many

_HOMES = {
    "evaluate": "heads.evaluate",
    "export": "heads.export",
    "load": "heads.model",
    "predict": "heads.predict",
    "train": "heads.train",
    "train_many": "heads.train",
}

__all__ = ["evaluate", "export", "load", "predict", "train", "train_many"]


class _Package(ModuleType):
    """Keeps `heads.train` the function: importing its file would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import heads` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'heads' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

"""Parts of ``run.json``: what a run reads, what it trains, and with which libraries."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from featstore.datasets.instances import box_of_spec
from featstore.items import read_dataset
from featstore.lines import read_columns
from featstore.remote.location import shown
from featstore.version import __version__
from heads.base import Head
from heads.labels import LabelSource
from heads.loop import Recipe
from heads.model import Model, shape_to_json
from heads.selection import Pair, Selection

if TYPE_CHECKING:
    from featstore.api import FeatureSet, Store


def what_is_read(
    store: Store, features: FeatureSet, model: Model, pairs: Iterable[Pair]
) -> dict[str, Any]:
    """Tell the features and taps that a run reads, and what its training images show."""
    plan = features.plan
    return {
        "store": shown(store.path.resolve()),
        "feature_sets": [features.key],
        "feature_set_names": [features.name],
        "plan": None if plan is None else plan.to_json(),
        "backbone": features.backbone,
        "weights_sha256": None if plan is None else plan.weights_sha256,
        "taps": list(model.tap_names),
        "head_taps": [shape.tap for shape in model.taps],
        "tap_shapes": [shape_to_json(shape) for shape in dict.fromkeys(model.taps)],
        "normed_taps": list(model.normed_taps),
        "boxes_shown": boxes_shown(features, [pair.row for pair in pairs]),
    }


def boxes_shown(features: FeatureSet, rows: Sequence[int]) -> list[str]:
    """List what images of animals show, each once: scales of boxes, or "image", as readers say.

    The data set that the images were extracted from decides it, not the one that labels them.
    """
    store = features.store
    boxes = {
        name: box_of_spec(read_dataset(store.folder, name)["spec"]) for name in store.datasets()
    }
    if not any(boxes.values()):
        return []  # most stores: then no row needs to be looked at
    assigned = read_columns(features.folder, ["row", "dataset"])
    is_read = np.isin(assigned["row"].to_numpy(), np.asarray(rows, np.int64))
    found = {boxes[name] for name in assigned["dataset"].filter(is_read).unique().to_pylist()}
    return sorted(each for each in found if each is not None)


def what_is_trained(
    selection: Selection, labels: LabelSource, recipe: Recipe, head: Head
) -> dict[str, Any]:
    """Tell a run's sizes, recipe and images."""
    return {
        "parameters": head.n_parameters(),
        "dead_parameters": head.dead_parameters(),
        "output_hw": list(head.output_hw),
        "seed": recipe.seed,
        "training": {"optimizer": "adamw", **recipe.to_json()},
        "validation": dict(selection.validation),
        "labels": {"kind": labels.kind, "data": labels.spec},
        "images": {
            name: len({(pair.dataset, pair.item) for pair in pairs})
            for name, pairs in selection.parts().items()
        },
    }


def versions() -> dict[str, str]:
    """Give the versions of the libraries that decide numbers."""
    return {
        "featstore": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }

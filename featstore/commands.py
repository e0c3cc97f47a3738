"""Command lines that messages name: the very one that adds what a feature set lacks."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from featstore.items import read_dataset
from featstore.lines import read_columns
from featstore.remote.location import shown
from featstore.store import FeatureSetFolder, StoreFolder


def extract_command(
    folder: FeatureSetFolder,
    *,
    taps: Sequence[str] = (),
    tail: int | None = None,
    views: Sequence[str] = (),
) -> str:
    """Give the `featstore extract` that adds taps, a tail or views to a feature set.

    It names what the key depends on, so that what is stored is used again.

    Args:
        folder: Feature set.
        taps: Taps to add.
        tail: Blocks to store; None: no tail.
        views: Views to add.
    """
    store = StoreFolder(folder.path.parents[1])
    words = ["featstore", "extract", "--store", shown(store.path)]
    words += ["--backbone", str(folder.attributes["backbone"].get("name", "NAME"))]
    for dataset in sorted(read_columns(folder, ["row", "dataset"])["dataset"].unique().to_pylist()):
        words += ["--data", f"{dataset}={read_dataset(store, dataset)['spec']}"]
    if taps:
        words += ["--taps", ",".join(taps)]
    if tail is not None:
        words += ["--tail", str(tail)]
    if views:
        words += ["--views", ",".join(views)]
    return shlex.join([*words, *_of_plan(folder)])


def _of_plan(folder: FeatureSetFolder) -> list[str]:
    """Name image size, rule, dtype and weights where they are not those of the defaults."""
    plan = folder.plan
    if plan is None:
        return []
    words = ["--image-size", "x".join(map(str, plan.image_size))]
    words += ["--resize", plan.resize] if plan.resize != "squash" else []
    words += ["--dtype", plan.dtype] if plan.dtype != "float16" else []
    weights = folder.attributes["provenance"].get("weights")
    return [*words, "--weights", str(weights)] if weights else words

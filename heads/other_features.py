"""Whether other features come from the backbone that a run learned from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from featstore.errors import invalid
from heads.runs import Run

if TYPE_CHECKING:
    from featstore.api import FeatureSet
    from featstore.feature_sets import FinalNorm


def check_same_backbone(run: Run, features: FeatureSet) -> None:
    """Refuse features of other weights than the run learned from.

    The hash of the weights covers the position grid, which changes with the size of the images;
    then the name of the published weights and the final norm tell.
    """
    plan, own = features.plan, run.record["plan"]
    hint = "A head reads only what it has learned to read."
    if plan is None or own is None:
        raise invalid("feature_set", features.name, "extracted here, not imported", hint=hint)
    if plan.weights_sha256 == own["weights_sha256"]:
        return
    names = [(one["architecture"], one["tag"]) for one in (own, plan.to_json())]
    is_random = plan.tag.startswith("random")  # drawn anew for another size
    norms = [one.final_norm() for one in (_own_features(run, features), features)]
    if names[0] != names[1] or is_random or not _is_same_norm(*norms):
        expected = "features of the same weights of the same backbone"
        raise invalid("feature_set", features.name, expected, hint=hint)


def _own_features(run: Run, features: FeatureSet) -> FeatureSet:
    return features.store.feature_set(run.record["feature_sets"][0])


def _is_same_norm(one: FinalNorm | None, other: FinalNorm | None) -> bool:
    return one is not None and other is not None and np.array_equal(one.weight, other.weight)

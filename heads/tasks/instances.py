"""Instance discrimination: pixels of one thing get alike embeddings, of others unlike ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import InvalidInputError, invalid
from featstore.geometry import to_source_map
from featstore.types import Placement
from heads.metrics import Metric, Stats
from heads.metrics.clusters import cluster, cluster_stats, summarise_clusters
from heads.tasks.base import TASKS, PreparedTargets, Task, TaskSettings
from heads.tasks.colours import class_colours, lay_over
from heads.tasks.regions import VOID, ids_in_frame, relabel

FRAME_HW = (112, 112)
"""Where embeddings are clustered."""

_OPACITY = 0.65
_STRIDE = 4  # every so many pixels of a held-out image are looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceOptions:
    """Choices of the instance task.

    An instance is large from `large_share` of the image on: 0.049 is 15,000 pixels of 480 x 640.
    Without a label, `heads predict` looks for `clusters` clusters.
    """

    embedding: int = 32  # channels of a pixel's embedding
    pixels: int = 256  # of each image of a batch that are learned from
    large_share: float = 0.049
    restarts: int = 15  # of k-means
    clusters: int = 8

    def __post_init__(self) -> None:
        for name in ("embedding", "pixels", "restarts", "clusters"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1")
        if not 0 < self.large_share < 1:
            raise invalid("large_share", self.large_share, "between 0 and 1")


class ClassMatrix(nn.Module):
    """One learned vector for each instance of the training images, and one for background."""

    offset: Tensor  # (slots,): where the instances of each prepared label begin

    def __init__(self, n_instances: Sequence[int], dim: int) -> None:
        super().__init__()
        counts = torch.tensor(n_instances)
        self.register_buffer("offset", counts.cumsum(0) - counts, persistent=False)
        self.weight = nn.Parameter(torch.randn(1 + int(counts.sum()), dim))

    def numbers(self, ids_bp: Tensor, slot_b: Tensor) -> Tensor:
        """Give the row of each pixel's instance: (batch, pixels), -1 where void."""
        of_all = ids_bp + self.offset[slot_b, None]
        return torch.where(ids_bp > 0, of_all, ids_bp)


@TASKS.register("instances.v1")
class InstanceTask(Task):
    """Learn an embedding in which each training instance is a class; measure by clustering.

    The class matrix (embedding x instances) is part of the loss, not of the head. Instances that
    are not learned from have no class, so the held-out loss takes, for each, the mean embedding
    of its own pixels. `at_source` gives the cluster of each pixel (int32).

    Source:
        Lueddecke & Ecker, TMLR 2025, section 4; HEADS.md 1.5.
    """

    OPTIONS = InstanceOptions
    label_kind = "instances"
    meaning = "embedding of each pixel; those of one instance are alike"
    primary_metric = "ari_fg"
    is_lower_better = False
    is_measured_in_training = False  # k-means takes about a second an image

    def __init__(self, **options: Any) -> None:
        self.options = InstanceOptions(**options)
        self.n_outputs = self.options.embedding
        self.settings = TaskSettings()

    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Number the instances at the output's resolution.

        Returns:
            ``ids`` (Ho, Wo) int16: 0 background, 1, 2, ... without gaps, -1 unknown.

        Raises:
            InvalidInputError: The label has another size than the image, or nothing is known.
        """
        return {"ids": relabel(ids_in_frame(values_hw, valid_hw, placement, output_hw))}

    def fit_to(self, targets: PreparedTargets) -> None:
        """Make a vector for each instance; torch's random numbers decide them.

        Raises:
            InvalidInputError: No image shows an instance.
        """
        counts = [max(int(ids.max()), 0) for ids in targets.arrays["ids"]]
        if not any(counts):
            raise InvalidInputError("No label shows an instance. Use labels with at least one.")
        self.criterion = ClassMatrix(counts, self.options.embedding)

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean cross-entropy over some random pixels of each image."""
        assert isinstance(self.criterion, ClassMatrix)
        ids_bp = targets["ids"].flatten(1).long()
        shape = (len(ids_bp), self.options.pixels)
        chosen = torch.randint(ids_bp.shape[1], shape, device=output.device)
        ids_bp = ids_bp.gather(1, chosen)
        embedding_bdp = output.flatten(2).gather(2, chosen[:, None].expand(-1, output.shape[1], -1))
        logits_bpc = embedding_bdp.mT @ self.criterion.weight.mT
        numbers = self.criterion.numbers(ids_bp, targets["slot"])
        total = functional.cross_entropy(
            logits_bpc.flatten(0, 1), numbers.flatten(), ignore_index=VOID, reduction="sum"
        )
        return total / (numbers != VOID).sum().clamp(min=1)

    def held_out_loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean cross-entropy where an instance's vector is the mean of its pixels."""
        losses = []
        for image_dyx, ids_yx in zip(output, targets["ids"], strict=True):
            pixels_pd = image_dyx.flatten(1)[:, ::_STRIDE].mT
            ids_p = ids_yx.flatten()[::_STRIDE].long()
            known = ids_p != VOID
            pixels_pd, ids_p = pixels_pd[known], ids_p[known]
            found, number = ids_p.unique(return_inverse=True)
            sums = pixels_pd.new_zeros(len(found), pixels_pd.shape[1])
            counts = number.bincount(minlength=len(found))[:, None]
            means_cd = sums.index_add(0, number, pixels_pd) / counts
            losses.append(functional.cross_entropy(pixels_pd @ means_cd.mT, number))
        return torch.stack(losses).mean()

    def predict(self, output: Tensor) -> Tensor:
        """Give embeddings as they are."""
        return output

    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Cluster the embeddings into `clusters`: int32 from 1, -1 outside of a crop."""
        small = _at_frame(prediction_chw)
        found = cluster(
            small.reshape(len(small), -1).T, self.options.clusters, restarts=self.options.restarts
        )
        return _to_source(found.reshape(FRAME_HW) + 1, placement)

    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float | list[float]]:
        """Cluster the embeddings at 112 x 112 into as many clusters as there are instances."""
        ids = ids_in_frame(values_hw, valid_hw, placement, FRAME_HW)
        known = ids != VOID
        return cluster_stats(
            _at_frame(prediction_chw)[:, known].T,
            ids[known],
            large_pixels=self.options.large_share * known.sum(),
            restarts=self.options.restarts,
        )

    def summarise(
        self, per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
    ) -> list[Metric]:
        """Give ari_fg and ari_all, over images with two instances or more, and @large."""
        return summarise_clusters(per_image, groups, seed=seed)

    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe the clustering and the averaging."""
        return {
            "label_sources": sorted(set(label_sources)),
            "resolution": "112 x 112 of the input frame, embeddings bilinearly",
            "clusters": "k-means with the true number of instances; ari_fg: of the pixels of "
            "instances (paper); ari_all: of all pixels, background one cluster more (release); "
            "both measured on the pixels of instances",
            "restarts": self.options.restarts,
            "average": "mean over images with two instances or more; @large: with at least three "
            f"of more than {self.options.large_share:g} of the image",
            "loss": "cross-entropy, one class an instance of the training images and background",
        }

    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Paint clusters over the image."""
        return _paint(prediction, prediction > 0, image_hwc)

    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Paint clusters and instances; equal colours do not mean equal things."""
        return {
            f"{self.options.clusters} clusters": self.render(prediction, image_hwc),
            "truth": _paint(values_hw, valid_hw & (values_hw > 0), image_hwc),
        }


def _paint(ids_hw: np.ndarray, where_hw: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
    ids = relabel(np.where(where_hw, ids_hw, 0).astype(np.int32))
    colours = class_colours(int(ids.max(initial=0)) + 1)[ids]
    return lay_over(image_hwc, colours, where_hw, _OPACITY)


def _at_frame(embedding_chw: np.ndarray) -> np.ndarray:
    """Bring embeddings to `FRAME_HW`, bilinearly."""
    resized = functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(embedding_chw))[None], size=FRAME_HW, mode="bilinear"
    )
    return resized[0].numpy()


def _to_source(ids_yx: np.ndarray, placement: Placement) -> np.ndarray:
    """Show a map of the input frame at the image's resolution: int32, -1 where it was cut off."""
    values, covered = to_source_map(ids_yx[None].astype(np.float32), placement, mode="nearest")
    return np.where(covered, np.nan_to_num(values[0]), VOID).astype(np.int32)

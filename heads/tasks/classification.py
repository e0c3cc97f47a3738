"""Classification of whole images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from featstore.errors import BadImageError, InvalidInputError, invalid, not_found
from featstore.types import Placement
from heads.labels import CLASS
from heads.metrics import Metric, Stats
from heads.metrics.labels import label_stats, summarise_labels
from heads.tasks.base import TASKS, LabelFacts, Task, TaskSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationOptions:
    """Choices of the classification task.

    `names` lists the classes, parted by "|"; where it is not given, they are those that the data
    sets' images have.
    """

    names: str = ""

    def __post_init__(self) -> None:
        names = self.names.split("|")
        if self.names and (len(names) < 2 or len(set(names)) < len(names)):
            raise invalid("names", self.names, "at least two names, each once, parted by |")


@TASKS.register("classification.v1")
class ClassificationTask(Task):
    """Learn the class of an image by cross-entropy, with a head that gives one answer an image.

    `at_source` gives the probability of each class, (n,) float32, in the order of `class_names`.
    """

    OPTIONS = ClassificationOptions
    label_kind = CLASS
    stage = "pooled"
    meaning = "log-probability of each class"
    primary_metric = "top1"
    is_lower_better = False
    predicts_logs = True

    def __init__(self, **options: Any) -> None:
        self.options = ClassificationOptions(**options)
        if not self.options.names:
            raise InvalidInputError(
                "classification needs at least two classes, and none are known. Name them: "
                "--set names=a|b."
            )
        self.class_names = tuple(self.options.names.split("|"))
        self.n_outputs = len(self.class_names)
        self.settings = TaskSettings()

    @classmethod
    def completed(cls, options: Mapping[str, Any], facts: LabelFacts) -> dict[str, Any]:
        """Take the classes from the data.

        Raises:
            InvalidInputError: The data has fewer than two.
        """
        class_names = facts.class_names
        if options["names"] or class_names is None:
            return dict(options)
        if len(class_names) < 2:
            raise invalid("classes of the data", ", ".join(class_names), "at least two")
        if any("|" in name for name in class_names):
            raise invalid("classes of the data", ", ".join(class_names), "names without |")
        return {**options, "names": "|".join(class_names)}

    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Number the class: ``class`` () int64.

        Raises:
            BadImageError: The class is not among those that are learned.
        """
        return {"class": np.array(self._number(values_hw))}

    def _number(self, values_hw: np.ndarray) -> int:
        name = str(values_hw)
        if name not in self.class_names:
            raise BadImageError(str(not_found("class", name, self.class_names)))
        return self.class_names.index(name)

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean cross-entropy over the images of the batch."""
        return functional.cross_entropy(output[:, :, 0, 0], targets["class"])

    def predict(self, output: Tensor) -> Tensor:
        """Give log-probabilities."""
        return output.log_softmax(dim=1)

    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Give the probability of each class: (n,) float32."""
        return np.exp(prediction_chw[:, 0, 0]).astype(np.float32)

    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float | list[float]]:
        """Keep the true class, its cross-entropy and its rank.

        Raises:
            BadImageError: The class is not among those that were learned.
        """
        log_p = prediction_chw[:, 0, 0].astype(np.float64)
        return label_stats(log_p, self._number(values_hw))

    def summarise(
        self, per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
    ) -> list[Metric]:
        """Give top1, balanced, top5 and ce."""
        return summarise_labels(per_image, groups, n_classes=self.n_outputs, seed=seed)

    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe the classes and the averaging."""
        return {
            "label_sources": sorted(set(label_sources)),
            "classes": self.n_outputs,
            "average": "over images; balanced: over classes that are there",
            "loss": "cross-entropy",
        }

    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Give the image: the answer stands in the caption."""
        return image_hwc

    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Give the image twice: answer and truth stand in the caption."""
        return {"prediction": image_hwc, "truth": image_hwc}

    def caption(self, prediction: np.ndarray, values: np.ndarray | None) -> str:
        """Name the three likeliest classes, and the true one."""
        best = np.argsort(-prediction, kind="stable")[:3]
        text = ", ".join(f"{self.class_names[i]} {prediction[i]:.2f}" for i in best)
        return text if values is None else f"{text} (truth: {values})"

"""What a task is: how labels become targets, what is minimised, what is measured, how it looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from featstore.registry import Registry
from featstore.types import Placement
from heads.metrics import Metric
from heads.options import parse_options


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """How a task is trained when the user says nothing else (AdamW)."""

    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 32
    steps: int = 1000
    output_bias: float = 0.0  # added to each output bias of the head before the first step


class Task(ABC):
    """Base of every task; a subclass is final and files itself under `TASKS`.

    A task is built as ``TASKS[name](**options)``, where `options` are the fields of its `OPTIONS`.
    """

    OPTIONS: ClassVar[type[Any]]  # a frozen dataclass that checks its own values
    label_kind: ClassVar[str]  # which dense label it learns from
    n_outputs: int
    settings: TaskSettings
    primary_metric: ClassVar[str]
    is_lower_better: ClassVar[bool]

    @abstractmethod
    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Turn one decoded label into training targets in the input frame, at `output_hw`.

        Args:
            values_hw: (source_h, source_w), physical values.
            valid_hw: (source_h, source_w), bool.
            placement: How the image was drawn into the input.
            output_hw: What the head gives.

        Returns:
            Arrays by name, of one shape and dtype for all images, to be stacked to a batch.

        Raises:
            InvalidInputError: The label has another size than the image, or no valid pixel.
        """

    @abstractmethod
    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the scalar to minimise for (batch, n_outputs, Ho, Wo) and stacked targets."""

    @abstractmethod
    def predict(self, output: Tensor) -> Tensor:
        """Turn a head's output into physical values, (batch, channels, Ho, Wo)."""

    @abstractmethod
    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Bring one image's `predict` to the image's own resolution, (source_h, source_w).

        What was not in the input (outside of a crop) is NaN.
        """

    @abstractmethod
    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float]:
        """Score one image's `predict` at its label's resolution: the sums that metrics need.

        Args:
            prediction_chw: (channels, Ho, Wo), in the input frame.
            placement: How the image was drawn into the input.
            values_hw: (source_h, source_w), physical values.
            valid_hw: (source_h, source_w), bool.
            dataset_format: Format of the image's data set ("nyu"), which may have a protocol.

        Raises:
            InvalidInputError: The label has another size than the image.
        """

    @abstractmethod
    def summarise(
        self,
        per_image: Sequence[Mapping[str, float]],
        groups: Sequence[str | None],
        *,
        seed: int = 0,
    ) -> list[Metric]:
        """Give all metrics, with intervals that resample groups, from what `measure` gave."""

    @abstractmethod
    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe how the metrics were made, as JSON values, for the record of a run.

        Args:
            label_sources: `Label.source` of the labels that were used.
        """

    @abstractmethod
    def render(self, prediction_hw: np.ndarray) -> np.ndarray:
        """Paint a prediction at source resolution: (H, W, 3) uint8 RGB."""

    @abstractmethod
    def render_with_truth(
        self, prediction_hw: np.ndarray, values_hw: np.ndarray, valid_hw: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Paint "prediction", "truth" and "error" in one scale: (H, W, 3) uint8 RGB each."""


TASKS: Registry[type[Task]] = Registry("task", group="heads.tasks")


def build_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Make a task by name; options may be text, as from a command line.

    Raises:
        NotFoundError: The task or an option is not known.
        InvalidInputError: An option has a wrong value.
    """
    task_type = TASKS[name]
    return task_type(**parse_options(task_type.OPTIONS, options or {}))

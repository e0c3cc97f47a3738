"""What a task is: how labels become targets, what is minimised, what is measured, how it looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from featstore.geometry import unflip
from featstore.registry import Registry
from featstore.skeleton import Skeleton
from featstore.types import Placement
from heads.base import Head, shift_output_biases
from heads.metrics import Metric, Stats
from heads.options import parse_options


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """How a task is trained when the user says nothing else (AdamW)."""

    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 32
    steps: int = 1000
    output_bias: float = 0.0  # added to each output bias of the head before the first step
    head_lrs: Mapping[str, float] = field(default_factory=dict)  # of heads that learn otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFacts:
    """What the labels of a training tell a task before it is built; None where nobody knows."""

    class_names: tuple[str, ...] | None = None
    skeleton: Skeleton | None = None  # of keypoints
    identities: tuple[str, ...] = ()  # who is trained on (species, individuals), in order


class PreparedTargets(Protocol):
    """The part of prepared targets that a task may look at before it is trained."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """Give what `Task.prepare` gave, stacked over all images, by name."""
        ...


class Task(ABC):
    """Base of every task; a subclass is final and files itself under `TASKS`.

    A task is built as ``TASKS[name](**options)``, where `options` are the fields of its `OPTIONS`.
    """

    OPTIONS: ClassVar[type[Any]]  # a frozen dataclass that checks its own values
    label_kind: str  # which label it learns from; where options decide, see `label_kind_for`
    primary_metric: ClassVar[str]
    is_lower_better: ClassVar[bool]
    is_measured_in_training: ClassVar[bool] = True  # whether its metric is quick enough for curves
    unit: ClassVar[str | None] = None  # of a map of numbers, which is drawn with a scale bar
    predicts_logs: ClassVar[bool] = False  # log-probabilities; their exponents are averaged
    stage: ClassVar[str] = "dense"  # how a head ends that can do so in several ways: heads.stages
    meaning: ClassVar[str] = ""  # what the channels of `predict` are, for who uses them elsewhere
    n_outputs: int
    numbers: int = 1  # of `n_outputs` for each thing that is asked for: x and y of a keypoint
    identities: tuple[str, ...] = ()  # names of what targets number as ``identity``
    settings: TaskSettings
    criterion: nn.Module | None = None  # what the loss learns beside the head; not part of it

    @property
    def readouts(self) -> tuple[int, ...]:
        """Split `n_outputs` among heads of their own, which learn side by side."""
        return (self.n_outputs,)

    @classmethod
    def completed(cls, options: Mapping[str, Any], facts: LabelFacts) -> dict[str, Any]:
        """Fill in the options that the user left to the data.

        Args:
            options: All options of the task by name.
            facts: What the labels tell.

        Raises:
            InvalidInputError: The labels do not suit the task.
        """
        return dict(options)

    @classmethod
    def label_kind_for(cls, options: Mapping[str, Any]) -> str:
        """Say which label a task of these options learns from, before it is built."""
        return cls.label_kind

    def check(self, facts: LabelFacts) -> None:  # noqa: B027  (most labels say what they are)
        """Refuse labels that mean something else than those that were learned.

        Raises:
            InvalidInputError: They do.
        """

    def start(self, head: Head) -> None:
        """Shift the output biases of a new head to where the task begins."""
        shift_output_biases(head, self.settings.output_bias)

    def fit_to(self, targets: PreparedTargets) -> None:  # noqa: B027  (most losses learn nothing)
        """Make `criterion`, where the loss depends on what there is to learn."""

    def middle(self, targets: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Give the one answer that suits training images best: a head may begin there.

        Args:
            targets: What `prepare` gave, stacked.

        Returns:
            (n_outputs,) float32, of a head; None where there is no such answer.
        """
        return None

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
            placement: How the image was drawn into the input. Where `is_flipped`, left and right
                are exchanged: a task whose targets name sides exchanges these too.
            output_hw: What the head gives.

        Returns:
            Arrays by name, of one shape and dtype for all images, to be stacked to a batch.

        Raises:
            InvalidInputError: The label has another size than the image, or no valid pixel.
        """

    @abstractmethod
    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the scalar to minimise for (batch, n_outputs, Ho, Wo) and stacked targets.

        Args:
            output: Of the head.
            targets: What `prepare` gave, and ``slot`` (batch,): the places of these images among
                all prepared targets.
        """

    def losses(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the loss of each image, (batch,)."""
        each = range(len(output))
        one = [{name: value[i : i + 1] for name, value in targets.items()} for i in each]
        return torch.stack([self.loss(output[i : i + 1], one[i]) for i in each])

    def held_out_loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give what the best step is chosen by, on images that are not learned from."""
        return self.loss(output, targets)

    @abstractmethod
    def predict(self, output: Tensor) -> Tensor:
        """Turn a head's output into what is measured, (batch, channels, Ho, Wo)."""

    def unflipped(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Bring what `predict` gave for a flipped view to what the plain view's would be.

        Args:
            prediction_chw: (channels, Ho, Wo).
            placement: How the flipped view was drawn into the input.
        """
        return unflip(prediction_chw, placement)

    def average(self, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """Average what `predict` gave for several views of one image, in one frame."""
        if self.predicts_logs:
            log_sum: np.ndarray = np.logaddexp.reduce(np.stack(predictions), axis=0)
            return log_sum - np.log(np.float32(len(predictions)))
        mean: np.ndarray = np.mean(predictions, axis=0)
        return mean

    @abstractmethod
    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Turn one image's `predict` into the answer for the image: what `heads predict` writes.

        Returns:
            A map (source_h, source_w), NaN or -1 where the source was not in the input (outside
            of a crop); or a table, as the task says.
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
    ) -> dict[str, float | list[float]]:
        """Score one image's `predict`: the numbers, and lists of numbers, that metrics need.

        Args:
            prediction_chw: (channels, Ho, Wo), in the input frame.
            placement: How the image was drawn into the input.
            values_hw: (source_h, source_w), physical values.
            valid_hw: (source_h, source_w), bool.
            dataset_format: Format of the image's data set ("nyu"), which may have a protocol.

        Raises:
            BadImageError: This label cannot be measured; others can.
            InvalidInputError: The task's protocol does not fit such labels.
        """

    @abstractmethod
    def summarise(
        self,
        per_image: Sequence[Stats],
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
    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Paint what `at_source` gave: (H, W, 3) uint8 RGB.

        Args:
            prediction: What `at_source` gave.
            image_hwc: (H, W, 3) uint8: the image, to paint on.
        """

    @abstractmethod
    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Paint "prediction", "truth" and perhaps more, such as "error": (H, W, 3) uint8 RGB."""

    def truth_map(self, values_hw: np.ndarray, valid_hw: np.ndarray) -> np.ndarray:
        """Give the numbers that a map of `unit` is compared with; NaN where there is none."""
        return np.where(valid_hw, values_hw, np.nan)

    def caption(self, prediction: np.ndarray, values: np.ndarray | None) -> str:
        """Say the answer in words, for the title of a picture; nothing where pictures say it.

        Args:
            prediction: What `at_source` gave.
            values: The label, where it is known.
        """
        return ""

    def legend(self, values_hw: np.ndarray) -> dict[str, tuple[int, int, int]]:
        """Name the colours of a picture of these values; nothing where they need no name."""
        return {}


TASKS: Registry[type[Task]] = Registry("task", group="heads.tasks")


def build_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Make a task by name; options may be text, as from a command line.

    Raises:
        NotFoundError: The task or an option is not known.
        InvalidInputError: An option has a wrong value.
    """
    task_type = TASKS[name]
    return task_type(**parse_options(task_type.OPTIONS, options or {}))

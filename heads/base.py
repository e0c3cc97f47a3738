"""What a head is: tokens of one or several taps in, one dense map of the input frame out.

Axis letters at the end of tensor names: ``b`` batch, ``t`` tokens, ``d`` dim of a tap, ``h`` heads
of the attention, ``q`` queries, ``n`` outputs, ``y x`` rows and columns of a map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from featstore.errors import invalid
from featstore.registry import Registry
from featstore.tail import TailWeights
from featstore.types import TapShape


@dataclass(frozen=True, kw_only=True, slots=True)
class TapTokens:
    """What one tap gives for a batch of images, as heads read it.

    Tokens are row-major over the grid. A token that saw only padding is False in `valid`; without
    `valid` every token counts.
    """

    patch: Tensor  # (batch, tokens, dim), any float dtype
    grid: tuple[int, int]  # rows, columns
    prefix: Tensor | None = None  # (batch, n_prefix, dim): CLS first, then registers
    valid: Tensor | None = None  # (batch, tokens) bool

    def __post_init__(self) -> None:
        n_tokens = self.grid[0] * self.grid[1]
        if self.patch.ndim != 3 or self.patch.shape[1] != n_tokens:
            expected = f"(batch, {n_tokens}, dim) for the grid {self.grid}"
            raise invalid("patch", tuple(self.patch.shape), expected)
        if self.valid is None:
            return
        if self.valid.dtype != torch.bool or self.valid.shape != self.patch.shape[:2]:
            expected = f"bool of shape {tuple(self.patch.shape[:2])}"
            raise invalid("valid", (self.valid.dtype, tuple(self.valid.shape)), expected)
        if not bool(self.valid.any(dim=1).all()):
            image = int((~self.valid.any(dim=1)).nonzero()[0, 0])
            raise invalid("valid", "no valid token", f"true somewhere in image {image}")

    def rows(self, index: Tensor) -> TapTokens:
        """Give some of the images, perhaps several times."""
        return TapTokens(
            patch=self.patch[index],
            grid=self.grid,
            prefix=None if self.prefix is None else self.prefix[index],
            valid=None if self.valid is None else self.valid[index],
        )

    def filled(self, dtype: torch.dtype) -> Tensor:
        """Give `patch` in a dtype, 0 where padded: a padded token may hold anything, NaN too."""
        patch = self.patch.to(dtype)
        return patch if self.valid is None else patch.masked_fill(~self.valid[:, :, None], 0.0)


class LearnableTask(Protocol):
    """The part of a task that a head learns from."""

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the scalar to minimise."""
        ...

    def losses(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the loss of each image, (batch,)."""
        ...


class Head(nn.Module, ABC):
    """Base of every head; a subclass is final and files itself under `HEADS`.

    A head is built as ``HEADS[name](taps=..., n_outputs=..., **options)``, where `options` are
    the fields of its `OPTIONS`. Modules named in `UNUSED` hold parameters that a released
    implementation counts but never applies.
    """

    OPTIONS: ClassVar[type[Any]]  # a frozen dataclass that checks its own values
    LR: ClassVar[float | None] = None  # learning rate where the user names none; None: the task's
    # Whether it gives one answer an image, a map of 1 x 1; None: as its task needs.
    is_pooled: ClassVar[bool | None] = False
    UNUSED: tuple[str, ...] = ()
    options: Any  # an instance of `OPTIONS`

    @abstractmethod
    def __init__(self, *, taps: Sequence[TapShape], n_outputs: int, **options: Any) -> None:
        super().__init__()
        if n_outputs < 1:
            raise invalid("n_outputs", n_outputs, "a positive number of output channels")

    @abstractmethod
    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, *output_hw), covering the whole input frame, padding included.

        Args:
            inputs: One a tap, in the order of the taps the head was built for.
        """

    def ask_on(self, queries: int) -> None:
        """Answer on a grid of `queries` a side from now on.

        Raises:
            InvalidInputError: This head has no grid of queries.
        """
        raise invalid("queries", queries, f"left out: {type(self).__name__} has no grid of queries")

    def read_grids(self, taps: Sequence[TapShape]) -> None:
        """Read the same taps on other grids from now on; `output_hw` may follow."""

    @property
    @abstractmethod
    def output_hw(self) -> tuple[int, int]:
        """Rows and columns of the output."""

    @abstractmethod
    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the biases that are added to the output: a task may shift their start."""

    def start_at(self, middle: Tensor) -> None:
        """Begin with one answer for all images, if the head can; others begin as published.

        Args:
            middle: (n_outputs,) what a task asks for, see `Task.middle`.
        """

    @classmethod
    def default_taps(
        cls, available: Mapping[str, TapShape], *, input_hw: tuple[int, int] | None
    ) -> tuple[str, ...]:
        """Choose the taps to read when the user names none; see `last_dense_tap`.

        Args:
            available: Dense taps of a feature set, by name.
            input_hw: Size of the backbone's input; None where it is not known.

        Raises:
            InvalidInputError: There is no obvious choice.
        """
        return last_dense_tap(available, input_hw=input_hw)

    @classmethod
    def completed(cls, options: Mapping[str, Any], *, stage: str) -> dict[str, Any]:
        """Fill in the options that the user left to the task.

        Args:
            options: All options of the head by name.
            stage: What the task needs, see `Task.stage`.

        Raises:
            InvalidInputError: An option does not suit the task.
        """
        return dict(options)

    @classmethod
    def with_identities(
        cls, options: Mapping[str, Any], identities: Sequence[str], *, numbers: int = 1
    ) -> dict[str, Any]:
        """Fill in the options that depend on whom the images show, see `Task.identities`.

        Args:
            options: All options of the head by name.
            identities: Whom the training images show, in the order of their numbers.
            numbers: Of the task for each thing that it asks for, see `Task.numbers`.

        Raises:
            InvalidInputError: An option does not suit them.
        """
        return dict(options)

    @classmethod
    def n_numbers(cls, options: Mapping[str, Any]) -> int:
        """Count the outputs for each thing that it is asked for: 1, but x and y of a keypoint."""
        return 1

    @classmethod
    def asked_taps(cls, options: Mapping[str, Any], *, depth: int | None) -> tuple[str, ...] | None:
        """Name the taps that its options ask for; None: the user names them, or `default_taps`.

        Args:
            options: All options of the head by name.
            depth: Blocks of the backbone; None where it has none, or nobody knows.
        """
        return None

    @classmethod
    def added_taps(cls, options: Mapping[str, Any], *, depth: int | None) -> tuple[str, ...]:
        """Name the taps that it reads after those that were chosen, whichever these are."""
        return ()

    @classmethod
    def n_tail_blocks(cls, options: Mapping[str, Any]) -> int:
        """Count the last blocks of the backbone that it holds copies of.

        Such a head takes a further argument `tail`, their `TailSpec`; `fill_tail` gives it their
        weights.
        """
        return 0

    def fill_tail(self, weights: TailWeights) -> None:
        """Begin with the backbone's own last blocks.

        Raises:
            InvalidInputError: This head holds no copies of blocks.
        """
        raise invalid("tail", weights.spec.n_blocks, f"left out: {type(self).__name__} has none")

    @property
    def raw_inputs(self) -> frozenset[int]:
        """Numbers of the taps that are read as the backbone's blocks gave them, never normed."""
        return frozenset()

    def lr_scales(self) -> Mapping[str, float]:
        """Give factors of the learning rate, by how the names of parameters begin."""
        return {}

    def output_for(self, inputs: Sequence[TapTokens], targets: Mapping[str, Tensor]) -> Tensor:
        """Answer for images whose targets are known: a head may know what they show by these."""
        return self(inputs)

    def learn(
        self, inputs: Sequence[TapTokens], targets: Mapping[str, Tensor], task: LearnableTask
    ) -> Tensor:
        """Give the scalar to minimise for one batch; a head may add a loss of its own."""
        return task.loss(self.output_for(inputs, targets), targets)

    def diagnose(self, inputs: Sequence[TapTokens]) -> dict[str, float]:
        """Measure itself on held-out images at each look: what a curve shall show, by name."""
        return {}

    def learned(self) -> dict[str, Any]:
        """Give what it learned that people can read, as JSON values, for the record of a run."""
        return {}

    def dead_parameters(self) -> int:
        """Count the parameters that exist but are never applied."""
        return sum(p.numel() for name in self.UNUSED for p in self.get_submodule(name).parameters())

    def n_parameters(self) -> int:
        """Count all parameters, the dead ones included, as released implementations do."""
        return sum(p.numel() for p in self.parameters())


HEADS: Registry[type[Head]] = Registry("head", group="heads.heads")


def shift_output_biases(head: Head, amount: float) -> None:
    """Add `amount` to every output bias of `head`, as a task asks for before training."""
    with torch.no_grad():
        for bias in head.output_biases():
            bias.add_(amount)


def start_layer_at(layer: nn.Module, middle: Tensor, *, share: float) -> None:
    """Let a last layer give (n_outputs,) about `middle`, whatever goes in, before it has learned.

    Args:
        layer: With a weight and a bias.
        middle: (n_outputs,).
        share: Of its weights that is kept; with 0 no gradient reaches what lies before them in
            the first step.
    """
    with torch.no_grad():
        layer.get_parameter("weight").mul_(share)
        layer.get_parameter("bias").copy_(middle)


def only_dense_tap(taps: Sequence[TapShape], *, head: str) -> TapShape:
    """Give the one dense tap that a single-tap head reads.

    Raises:
        InvalidInputError: There are none or several taps, or the tap is pooled.
    """
    if len(taps) != 1:
        names = tuple(shape.tap for shape in taps)
        raise invalid("taps", names, f"exactly one tap for the head {head}", hint="Use one --tap.")
    if taps[0].grid is None:
        raise invalid("tap", taps[0].tap, f"a dense tap for the head {head}; this one is pooled")
    return taps[0]


def check_inputs(inputs: Sequence[TapTokens], widths: Sequence[int]) -> None:
    """Refuse tokens of another number of taps, or of another width, than the head was built for.

    Raises:
        InvalidInputError: They differ.
    """
    given = tuple(tokens.patch.shape[2] for tokens in inputs)
    if given != tuple(widths):
        raise invalid("inputs", given, f"tokens of width {tuple(widths)}, one entry a tap")


def last_dense_tap(
    available: Mapping[str, TapShape], *, input_hw: tuple[int, int] | None, max_stride: int = 16
) -> tuple[str, ...]:
    """Choose the final norm, else the last block, else the deepest stage of a fine enough grid.

    Args:
        available: Taps of a feature set, by name; pooled ones are passed over.
        input_hw: Size of the backbone's input; needed to tell the stride of several stages.
        max_stride: Pixels a token of the coarsest stage that is taken. Where no stage is that
            fine, the finest one is taken.

    Raises:
        InvalidInputError: No tap is dense, or the stride of several taps is not known.
    """
    dense = {tap: shape.grid for tap, shape in available.items() if shape.grid is not None}
    if not dense:
        raise invalid("taps", tuple(available), "at least one dense tap")
    if "norm" in dense or len(dense) == 1:
        return ("norm",) if "norm" in dense else tuple(dense)
    blocks = [tap for tap in dense if tap.startswith("block:")]
    if blocks:
        return (max(blocks, key=_number),)
    if input_hw is None:
        raise invalid(
            "taps", tuple(dense), "named, as the input size is not known", hint="Use --tap."
        )
    fine = [tap for tap, grid in dense.items() if input_hw[0] <= max_stride * grid[0]]
    finest = max(dense, key=lambda tap: dense[tap][0] * dense[tap][1])
    return (max(fine, key=_number, default=finest),)


def _number(tap: str) -> int:
    return int(tap.partition(":")[2])

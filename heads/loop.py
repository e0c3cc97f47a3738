"""The optimisation: steps, validation, early stopping, and a state that resumes exactly."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor

from featstore.errors import InvalidInputError, invalid
from featstore.types import Progress, ProgressCallback
from heads.feed import Batch
from heads.model import Model

CURVES_SCHEMA = pa.schema(
    [("step", pa.int64()), ("split", pa.string()), ("name", pa.string()), ("value", pa.float64())]
)
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopOptions:
    """Choices of a training that are neither the head's nor the task's.

    The learning rate stays constant, as in DeAP's release; "cosine" lets it fall to zero. The
    loss on the held-out part is looked at `checks` times in a run; after `patience` looks without
    a better one training stops (0: never).
    """

    schedule: str = "constant"
    checks: int = 20
    patience: int = 8
    val_images: int = 512  # held-out images that are looked at, evenly spaced, at most
    metric_images: int = 16  # of these, images whose metric is measured for the curves
    pictures: int = 4  # measured images that are drawn, evenly spaced

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise invalid("schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        for name, least in (
            ("checks", 1),
            ("patience", 0),
            ("val_images", 1),
            ("metric_images", 0),
            ("pictures", 0),
        ):
            if getattr(self, name) < least:
                raise invalid(name, getattr(self, name), f"at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one run is trained (AdamW), settled."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    loop: LoopOptions

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1")
        if not (0 < self.lr < math.inf):
            raise invalid("lr", self.lr, "a positive number", hint="Try 1e-3.")

    @property
    def check_every(self) -> int:
        """Steps between two looks at the held-out part."""
        return max(1, self.steps // self.loop.checks)

    def lr_at(self, step: int) -> float:
        """Give the learning rate of a step, the first being 0."""
        if self.loop.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr

    def to_json(self) -> dict[str, Any]:
        """Give JSON values; `recipe_from_json` inverts it."""
        return asdict(self)


def recipe_from_json(value: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe from `Recipe.to_json`."""
    return Recipe(**{**value, "loop": LoopOptions(**value["loop"])})


class Data(Protocol):
    """What the loop learns from."""

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in an epoch, at least one."""
        ...

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """Give the batches of an epoch from `start` on."""
        ...

    def held_out(self) -> Iterator[Batch]:
        """Give the held-out batches, always the same; none where nothing is held out."""
        ...

    def held_out_metric(self) -> tuple[str, float] | None:
        """Measure the metric on a few held-out images."""
        ...


class Loop:
    """One training: between two steps its `state` is all that decides what follows."""

    def __init__(
        self, model: Model, recipe: Recipe, data: Data, *, progress: ProgressCallback
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.step = 0  # steps done
        self.best_step = 0
        self.best_value: float | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.is_stopped = False
        self.curves: list[tuple[int, str, str, float]] = []
        self._data = data
        self._progress = progress
        self._bad_checks = 0
        self._is_whole = True  # False in the middle of a step
        self._optimizer = torch.optim.AdamW(
            model.head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to do."""
        return self.is_stopped or self.step >= self.recipe.steps

    def run(self, save: Callable[[], None], *, is_due: Callable[[], bool]) -> None:
        """Train to the end.

        Ctrl-C takes effect between two steps; `save` is called before it goes on its way.

        Args:
            save: Writes the state down.
            is_due: Whether it is time to, asked after each step.

        Raises:
            InvalidInputError: The loss is not finite.
            KeyboardInterrupt: Ctrl-C, or the progress callback asked for it.
        """
        self.model.head.train()
        try:
            with deferred_interrupt() as is_asked:
                while not self.is_done:
                    for batch in self._rest_of_epoch():
                        self._advance(batch)
                        if is_asked():
                            raise KeyboardInterrupt
                        if is_due():
                            save()
                        if self.is_done:
                            break
        except KeyboardInterrupt:
            if self._is_whole:
                save()
            raise
        if self.best_state is None:  # nothing was held out: the last weights are the best known
            self._keep_best(None)
        save()

    def _rest_of_epoch(self) -> Iterator[Batch]:
        epoch, start = divmod(self.step, self._data.batches_per_epoch)
        return self._data.epoch(epoch, start)

    def _advance(self, batch: Batch) -> None:
        self._is_whole = False
        loss = self._learn(batch)
        self.step += 1
        self.curves.append((self.step, "train", "loss", loss))
        if self.step % self.recipe.check_every == 0 or self.step == self.recipe.steps:
            self._check()
        self._is_whole = True
        self._progress(Progress(stage="train", done=self.step, total=self.recipe.steps))

    def _learn(self, batch: Batch) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.model.task.loss(self.model.head(batch.inputs), batch.targets)
        value = float(loss.item())
        if not math.isfinite(value):
            paths = ", ".join(pair.path for pair in batch.pairs[:3])
            raise InvalidInputError(
                f"The loss became {value} at step {self.step + 1} (learning rate "
                f"{self.recipe.lr_at(self.step):g}, images {paths}...). Try a smaller --lr, "
                f"--tap-norm final, or look at the labels of these images."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return value

    @torch.no_grad()
    def _check(self) -> None:
        """Look at the held-out part, keep the best weights, stop where they stay the best."""
        self.model.head.eval()
        total, count = 0.0, 0
        for batch in self._data.held_out():
            loss = self.model.task.loss(self.model.head(batch.inputs), batch.targets)
            total += float(loss.item()) * len(batch.pairs)
            count += len(batch.pairs)
        metric = self._data.held_out_metric() if count else None
        self.model.head.train()
        if not count:
            return
        value = total / count
        self.curves.append((self.step, "val", "loss", value))
        if metric is not None:
            self.curves.append((self.step, "val", *metric))
        if self.best_value is None or value < self.best_value:
            self._keep_best(value)
        else:
            self._bad_checks += 1
            self.is_stopped = 0 < self.recipe.loop.patience <= self._bad_checks

    def _keep_best(self, value: float | None) -> None:
        self.best_value, self.best_step, self._bad_checks = value, self.step, 0
        state = self.model.head.state_dict()
        self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def state(self) -> dict[str, Any]:
        """Give everything that decides what follows, in plain types and tensors."""
        cuda = torch.cuda.get_rng_state_all() if self.model.device.type == "cuda" else []
        return {
            "step": self.step,
            "head": self.model.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "best": {
                "step": self.best_step,
                "value": self.best_value,
                "state": self.best_state,
                "bad_checks": self._bad_checks,
            },
            "is_stopped": self.is_stopped,
            "curves": self.curves,
            "random": {"torch": torch.get_rng_state(), "cuda": cuda},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.step, self.is_stopped = state["step"], state["is_stopped"]
        self.model.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        best = state["best"]
        self.best_step, self.best_value = best["step"], best["value"]
        self.best_state, self._bad_checks = best["state"], best["bad_checks"]
        self.curves = [(step, split, name, value) for step, split, name, value in state["curves"]]
        torch.set_rng_state(state["random"]["torch"].cpu())
        if state["random"]["cuda"] and self.model.device.type == "cuda":
            torch.cuda.set_rng_state_all([each.cpu() for each in state["random"]["cuda"]])

    def curves_table(self) -> pa.Table:
        """Give the curves: step, split, name, value."""
        columns: list[Any] = [list(column) for column in zip(*self.curves, strict=True)]
        return pa.table(columns or [[], [], [], []], schema=CURVES_SCHEMA)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until it is asked for; a second one acts at once.

    Only the main thread gets signals; elsewhere nothing is changed. Yields the question.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, note) if is_main else None
    try:
        yield lambda: bool(asked)
    finally:
        if is_main:  # a handler that was not set from Python reads as None
            signal.signal(signal.SIGINT, before or signal.default_int_handler)

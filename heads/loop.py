"""The optimisation of one head: steps, looks at the held-out part, a state that resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from featstore.errors import InvalidInputError, invalid
from featstore.views import PLAIN
from heads.base import TapTokens
from heads.model import Model
from heads.selection import Pair

CURVES_SCHEMA = pa.schema(
    [("step", pa.int64()), ("split", pa.string()), ("name", pa.string()), ("value", pa.float64())]
)
SCHEDULES = ("constant", "cosine", "poly", "onecycle")
_POLY_POWER = 0.9
_RISING, _FIRST, _LAST = 0.3, 1 / 25, 1 / 2500  # of "onecycle": share of the steps, of the rate
AUTO, ONE, ALL = "auto", "one", "all"
IDENTITY, NONE = "identity", "none"
VIEWS = (AUTO, ONE, ALL, PLAIN)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopOptions:
    """Choices of a training that are neither the head's nor the task's.

    The learning rate stays constant, as in DeAP's release; "cosine" lets it fall to zero, "poly"
    as the share of steps to come to the power of 0.9; "onecycle" lets it rise from a 25th for
    three tenths of the steps and then fall to a 2500th, both as cosines. It rises evenly in the
    first `warmup` steps. Gradients longer than `clip` altogether are shortened (0: never).

    The loss on the held-out part is looked at `checks` times in a run; after `patience` looks
    without a better one training stops (0: never). Where other `views` of an image are stored
    than the plain one, an epoch shows one of them, drawn anew each time ("one", which "auto"
    means then), "all" of them, or the "plain" one; the held-out part is always plain. With
    `balance` "identity", an epoch is as long and shows each label (species, individual) equally
    often: images of a rare one several times, others in turn.
    """

    schedule: str = "constant"
    warmup: int = 0
    clip: float = 0.0
    views: str = AUTO
    balance: str = NONE
    checks: int = 20
    patience: int = 8
    val_images: int = 512  # held-out images that are looked at, evenly spaced, at most
    metric_images: int = 16  # of these, images whose metric is measured for the curves
    pictures: int = 4  # measured images that are drawn, evenly spaced

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise invalid("schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        if self.views not in VIEWS:
            raise invalid("views", self.views, f"one of {', '.join(VIEWS)}")
        if self.balance not in (IDENTITY, NONE):
            raise invalid("balance", self.balance, f"{IDENTITY} or {NONE}")
        for name, least in (
            ("warmup", 0),
            ("clip", 0),
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
        if not (0 <= self.weight_decay < math.inf):
            raise invalid("weight_decay", self.weight_decay, "0 or more", hint="Try 0.01.")

    @property
    def check_every(self) -> int:
        """Steps between two looks at the held-out part."""
        return max(1, self.steps // self.loop.checks)

    def lr_at(self, step: int) -> float:
        """Give the learning rate of a step, the first being 0."""
        done = step / self.steps
        warm = min(1.0, step / self.loop.warmup) if self.loop.warmup else 1.0
        if self.loop.schedule == "cosine":
            return warm * self.lr * _falling(done)
        if self.loop.schedule == "poly":
            return warm * self.lr * (1 - done) ** _POLY_POWER
        if self.loop.schedule == "onecycle":
            return warm * self.lr * _one_cycle(done)
        return warm * self.lr

    def to_json(self) -> dict[str, Any]:
        """Give JSON values; `recipe_from_json` inverts it."""
        return asdict(self)


def _falling(share: float) -> float:
    """Fall from 1 to 0 as a cosine."""
    return 0.5 * (1 + math.cos(math.pi * share))


def _one_cycle(share: float) -> float:
    """Rise from `_FIRST` to 1 and fall to `_LAST`."""
    if share < _RISING:
        return 1 - (1 - _FIRST) * _falling(share / _RISING)
    return _LAST + (1 - _LAST) * _falling((share - _RISING) / (1 - _RISING))


def recipe_from_json(value: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe from `Recipe.to_json`."""
    return Recipe(**{**value, "loop": LoopOptions(**value["loop"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Tokens and targets of some pairs, on the device."""

    pairs: Sequence[Pair]
    inputs: list[TapTokens]
    targets: dict[str, Tensor]


class Loop:
    """One training: between two steps its `state` is all that decides what follows.

    It draws from random numbers of its own, those of torch when it was made, so that it learns
    the same alone and beside others.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.step = 0  # steps done
        self.best_step = 0
        self.best_value: float | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.is_stopped = False
        self.curves: list[tuple[int, str, str, float]] = []
        self._bad_checks = 0
        self._looked: list[tuple[int, float]] = []  # pairs and mean loss of a look's batches
        self._diagnosis: dict[str, float] = {}  # of the head, on the first of these batches
        model.head.train()
        self._random = _get_random(model.device)
        groups = self._parameters()
        self._lr_scales = list(groups)
        self._optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in groups.values()],
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
        )

    def _parameters(self) -> dict[float, list[nn.Parameter]]:
        """Group the parameters by the factor of their learning rate."""
        scales = self.model.head.lr_scales()
        criterion = self.model.task.criterion
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, parameter in self.model.head.named_parameters():
            scale = next((s for start, s in scales.items() if name.startswith(start)), 1.0)
            groups.setdefault(scale, []).append(parameter)
        groups[1.0] += [] if criterion is None else list(criterion.parameters())
        return groups

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to do."""
        return self.is_stopped or self.step >= self.recipe.steps

    @property
    def is_check_due(self) -> bool:
        """Whether the held-out part is looked at after the step that was done last."""
        return self.step % self.recipe.check_every == 0 or self.step == self.recipe.steps

    def advance(self, batch: Batch) -> None:
        """Learn from one batch.

        Raises:
            InvalidInputError: The loss is not finite.
        """
        with self._own_random_numbers():
            loss = self._learn(batch)
        self.step += 1
        self.curves.append((self.step, "train", "loss", loss))

    def _learn(self, batch: Batch) -> float:
        for scale, group in zip(self._lr_scales, self._optimizer.param_groups, strict=True):
            group["lr"] = scale * self.recipe.lr_at(self.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.model.head.learn(batch.inputs, batch.targets, self.model.task)
        value = float(loss.item())
        self._check_finite(value, self.step + 1, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.recipe.loop.clip:
            parameters = (p for group in self._optimizer.param_groups for p in group["params"])
            nn.utils.clip_grad_norm_(parameters, self.recipe.loop.clip)
        self._optimizer.step()
        return value

    @torch.no_grad()
    def look(self, batch: Batch) -> None:
        """Take in one batch of the held-out part.

        Raises:
            InvalidInputError: The loss is not finite.
        """
        head = self.model.head.eval()
        output = head.output_for(batch.inputs, batch.targets)
        loss = self.model.task.held_out_loss(output, batch.targets)
        if not self._looked:
            self._diagnosis = head.diagnose(batch.inputs)
        head.train()
        value = float(loss.item())
        self._check_finite(value, self.step, batch)
        self._looked.append((len(batch.pairs), value))

    def _check_finite(self, value: float, step: int, batch: Batch) -> None:
        if not math.isfinite(value):
            paths = ", ".join(pair.path for pair in batch.pairs[:3])
            raise InvalidInputError(
                f"The loss became {value} at step {step} (learning rate "
                f"{self.recipe.lr_at(step - 1):g}, images {paths}...). Try a smaller --lr, "
                f"--tap-norm final, or look at the labels of these images."
            )

    def judge(self, metric: tuple[str, float] | None) -> None:
        """End a look: keep the best weights, stop where they stay the best.

        Args:
            metric: Name and value of the metric of a few held-out images, for the curves.
        """
        if not self._looked:
            return
        count = sum(n for n, _ in self._looked)
        value = sum(n * loss for n, loss in self._looked) / count
        self._looked = []
        self.curves.append((self.step, "val", "loss", value))
        measured = [*self._diagnosis.items(), *([] if metric is None else [metric])]
        self.curves += [(self.step, "val", *each) for each in measured]
        if self.best_value is None or value < self.best_value:
            self._keep_best(value)
        else:
            self._bad_checks += 1
            self.is_stopped = 0 < self.recipe.loop.patience <= self._bad_checks

    def end(self) -> None:
        """Where nothing was held out, the last weights are the best known."""
        if self.best_state is None:
            self._keep_best(None)

    def _keep_best(self, value: float | None) -> None:
        self.best_value, self.best_step, self._bad_checks = value, self.step, 0
        state = self.model.head.state_dict()
        self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def state(self) -> dict[str, Any]:
        """Give everything that decides what follows, in plain types and tensors."""
        criterion = self.model.task.criterion
        return {
            "step": self.step,
            "head": self.model.head.state_dict(),
            "criterion": None if criterion is None else criterion.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "best": {
                "step": self.best_step,
                "value": self.best_value,
                "state": self.best_state,
                "bad_checks": self._bad_checks,
            },
            "is_stopped": self.is_stopped,
            "curves": self.curves,
            "random": self._random,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.step, self.is_stopped = state["step"], state["is_stopped"]
        self.model.head.load_state_dict(state["head"])
        if self.model.task.criterion is not None:
            self.model.task.criterion.load_state_dict(state["criterion"])
        self._optimizer.load_state_dict(state["optimizer"])
        best = state["best"]
        self.best_step, self.best_value = best["step"], best["value"]
        self.best_state, self._bad_checks = best["state"], best["bad_checks"]
        self.curves = [(step, split, name, value) for step, split, name, value in state["curves"]]
        self._random = state["random"]

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        device = self.model.device
        _set_random(self._random, device)
        yield
        self._random = _get_random(device)

    def curves_table(self) -> pa.Table:
        """Give the curves: step, split, name, value."""
        columns: list[Any] = [list(column) for column in zip(*self.curves, strict=True)]
        return pa.table(columns or [[], [], [], []], schema=CURVES_SCHEMA)


def _get_random(device: torch.device) -> dict[str, Any]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_random(random: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(random["torch"].cpu())
    if random["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"][0].cpu(), device)

"""Adapting a trained head to one more identity from a few images that are in memory.

With the token alone, many adaptations are one computation: what the frozen decoder sees in the
images is computed once, and the tokens of all adaptations learn side by side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featstore.errors import InvalidInputError, invalid
from featstore.types import Progress, ProgressCallback, ignore_progress
from heads.adapt_modes import TOKEN, free_part, optimizer_of, own_lr, parts_of
from heads.base import LearnableTask, TapTokens
from heads.identity_token import IdentityToken
from heads.token_decoder import Seen, joined

_ROWS_AT_ONCE = 256  # of several adaptations, in one step
_SEEN_AT_ONCE = 64  # images whose keys and values are in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Images of an identity in memory: what the head reads, and the targets of the task."""

    inputs: Sequence[TapTokens]
    targets: Mapping[str, Tensor]

    def __len__(self) -> int:
        return self.inputs[0].patch.shape[0]

    def rows(self, index: Tensor) -> Images:
        """Give some of the images, perhaps several times."""
        return Images(
            inputs=[tokens.rows(index) for tokens in self.inputs],
            targets={name: value[index] for name, value in self.targets.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How every adaptation is trained: as many steps, whatever is trained."""

    mode: str = TOKEN
    steps: int = 300
    lr: float | None = None  # of the token, or of what is trained without one; None: `own_lr`
    batch_size: int = 16  # images a step, all where there are fewer

    def __post_init__(self) -> None:
        parts_of(self.mode)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise invalid("lr", self.lr, "a positive number", hint=f"Try {own_lr(self.mode):g}.")

    @property
    def rate(self) -> float:
        """Give the learning rate."""
        return own_lr(self.mode) if self.lr is None else self.lr


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where one adaptation begins, and what it learns from."""

    token: Tensor  # (width,)
    support: tuple[int, ...]  # numbers of images; without any, nothing is trained
    seed: int = 0  # of the order of batches, and of what a method draws


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """One adaptation."""

    token: Tensor  # (width,)
    weights: Mapping[str, Tensor]  # of the head, by name, that were trained beside the token
    losses: Tensor  # (steps,)
    output: Tensor | None  # of the head, for the images that were asked about


def adapt_many(
    head: IdentityToken,
    task: LearnableTask,
    images: Images,
    starts: Sequence[Start],
    recipe: Recipe,
    *,
    asked: Images | None = None,
    progress: ProgressCallback = ignore_progress,
) -> list[Adapted]:
    """Adapt a head from every start; the head itself stays as it is.

    Args:
        head: Trained.
        task: Its task.
        images: What the starts learn from.
        starts: One an adaptation.
        recipe: How each is trained.
        asked: Images to answer for once each is adapted.
        progress: Called as adaptations and steps go by.

    Raises:
        InvalidInputError: A loss is not finite.
    """
    if parts_of(recipe.mode)[1]:
        return [
            _adapt_one(head, task, images, start, recipe, asked=asked)
            for start in _told(starts, progress)
        ]
    tokens, losses = _adapt_tokens(head, task, images, starts, recipe, progress=progress)
    outputs = _answers(head, asked, tokens)
    return [
        Adapted(token=token, weights={}, losses=loss, output=output)
        for token, loss, output in zip(tokens, losses.T, outputs, strict=True)
    ]


def _told(starts: Sequence[Start], progress: ProgressCallback) -> Iterator[Start]:
    for number, start in enumerate(starts):
        progress(Progress(stage="adapt", done=number, total=len(starts)))
        yield start
    progress(Progress(stage="adapt", done=len(starts), total=len(starts)))


def _adapt_tokens(
    head: IdentityToken,
    task: LearnableTask,
    images: Images,
    starts: Sequence[Start],
    recipe: Recipe,
    *,
    progress: ProgressCallback,
) -> tuple[Tensor, Tensor]:
    """Train the tokens of all starts together: (starts, width) and (steps, starts)."""
    frozen = copy.deepcopy(head).requires_grad_(False).eval()
    tokens_nd = torch.stack([start.token for start in starts]).to(frozen.queries).clone()
    losses = tokens_nd.new_zeros(recipe.steps, len(starts))
    going = [number for number, start in enumerate(starts) if start.support]
    used = sorted({image for start in starts for image in start.support})
    if not used:
        return tokens_nd, losses
    place_of = {image: place for place, image in enumerate(used)}
    needed = images.rows(torch.tensor(used, device=tokens_nd.device))
    view = _View(frozen, needed)
    supports = [torch.tensor([place_of[i] for i in start.support]) for start in starts]
    for group in _groups(going, [min(len(s), recipe.batch_size) for s in supports]):
        chosen = [starts[number] for number in group]
        learned, lost = _train_tokens(
            frozen, task, view, [supports[n] for n in group], chosen, recipe=recipe
        )
        tokens_nd[group], losses[:, group] = learned, lost
        progress(Progress(stage="adapt", done=going.index(group[-1]) + 1, total=len(going)))
    return tokens_nd, losses


def _groups(going: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Part adaptations into groups whose batches together are not too large."""
    group: list[int] = []
    for number in going:
        if group and sum(sizes[n] for n in group) + sizes[number] > _ROWS_AT_ONCE:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _train_tokens(
    head: IdentityToken,
    task: LearnableTask,
    view: _View,
    supports: Sequence[Tensor],
    starts: Sequence[Start],
    *,
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:
    """Train some tokens side by side: each has the gradient of its own mean loss alone."""
    tokens_nd = nn.Parameter(torch.stack([start.token for start in starts]).to(head.queries))
    optimizer = optimizer_of(recipe.mode, tokens_nd, {}, lr=recipe.rate)
    draws = [
        _draws(support, recipe, start.seed) for support, start in zip(supports, starts, strict=True)
    ]
    sizes = torch.tensor([min(len(s), recipe.batch_size) for s in supports])
    owner = torch.arange(len(supports)).repeat_interleave(sizes).to(tokens_nd.device)
    shares = (1 / sizes.to(tokens_nd))[owner]
    losses: list[Tensor] = []
    # All images in every step: then they are gathered once.
    is_same = max(map(len, supports)) <= recipe.batch_size
    for step in range(recipe.steps):
        index = torch.cat([next(draw) for draw in draws]).to(tokens_nd.device)
        if step == 0 or not is_same:
            seen, targets = view.seen(index), view.targets(index)
        each = task.losses(head.answer(seen, tokens_nd[owner]), targets)
        lost = torch.zeros_like(tokens_nd[:, 0]).index_add(0, owner, each * shares)
        _check_finite(lost, step, recipe)
        losses.append(lost.detach())
        optimizer.zero_grad(set_to_none=True)
        lost.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return tokens_nd.detach(), torch.stack(losses)


def _draws(support: Tensor, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """Give the images of each step: all of them, or as many as a batch has, in turn."""
    generator = torch.Generator().manual_seed(seed)
    waiting = support
    while True:
        if len(support) <= recipe.batch_size:
            yield support
            continue
        if len(waiting) < recipe.batch_size or waiting is support:
            waiting = support[torch.randperm(len(support), generator=generator)]
        yield waiting[: recipe.batch_size]
        waiting = waiting[recipe.batch_size :]


def _check_finite(lost: Tensor, step: int, recipe: Recipe) -> None:
    if not bool(torch.isfinite(lost).all()):
        value = float(lost.detach().sum())
        raise InvalidInputError(
            f"The loss of an adaptation ({recipe.mode}) became {value} at step {step + 1} "
            f"(learning rate {recipe.rate:g}). Try a smaller --lr."
        )


def _adapt_one(
    head: IdentityToken,
    task: LearnableTask,
    images: Images,
    start: Start,
    recipe: Recipe,
    *,
    asked: Images | None,
) -> Adapted:
    """Train a copy of the head, and a token where the mode has one."""
    is_token, _ = parts_of(recipe.mode)
    own = copy.deepcopy(head).eval()
    trained = free_part(own, recipe.mode, seed=start.seed)
    token_d = nn.Parameter(start.token.to(own.queries).clone(), requires_grad=is_token)
    losses = torch.zeros(recipe.steps)
    if start.support:
        token = token_d if is_token else None
        optimizer = optimizer_of(recipe.mode, token, trained, lr=recipe.rate)
        support = torch.tensor(start.support, device=token_d.device)
        view = _View(own, images.rows(support))
        draws = _draws(torch.arange(len(support)), recipe, start.seed)
        for step in range(recipe.steps):
            index = next(draws).to(token_d.device)
            output = own.answer(view.seen(index), token_d.expand(len(index), -1))
            lost = task.loss(output, view.targets(index))
            _check_finite(lost, step, recipe)
            losses[step] = lost.detach()
            optimizer.zero_grad(set_to_none=True)
            lost.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    adapted_d = token_d.detach()
    return Adapted(
        token=adapted_d,
        weights={name: value.detach() for name, value in trained.items()},
        losses=losses,
        output=_answers(own, asked, adapted_d[None])[0],
    )


class _View:
    """What a head sees in some images, computed once as far as nothing trained decides it."""

    def __init__(self, head: IdentityToken, images: Images) -> None:
        self._head, self._images = head, images
        self._memory: Seen | TapTokens | None = None
        self._seen: Seen | TapTokens | None = None
        one = head.remember(images.rows(torch.tensor([0])).inputs)
        if not _is_trained(head.glance(one)):
            self._seen = _in_parts(images, head.see)
        elif not _is_trained(one):
            self._memory = _in_parts(images, head.remember)

    def seen(self, index: Tensor) -> Seen | TapTokens:
        """Give what it sees in some of the images."""
        if self._seen is not None:
            return self._seen.rows(index)
        if self._memory is not None:
            return self._head.glance(self._memory.rows(index))
        return self._head.see(self._images.rows(index).inputs)

    def targets(self, index: Tensor) -> dict[str, Tensor]:
        """Give the targets of some of the images."""
        return {name: value[index] for name, value in self._images.targets.items()}


def _in_parts(
    images: Images, see: Callable[[Sequence[TapTokens]], Seen | TapTokens]
) -> Seen | TapTokens:
    """See all images, few at a time: keys and values take four times the memory of tokens."""
    parts: list[Seen] = []
    for index in torch.split(torch.arange(len(images)), _SEEN_AT_ONCE):
        part = see(images.rows(index).inputs)
        if isinstance(part, TapTokens):  # the token changes the patches: nothing can be prepared
            return see(images.inputs)
        parts.append(part)
    return joined(parts)


def _is_trained(seen: Seen | TapTokens) -> bool:
    """Tell whether something that is trained decides it."""
    if isinstance(seen, TapTokens):
        return seen.patch.requires_grad
    return any(tensor.requires_grad for tensor in seen.tensors())


@torch.no_grad()
def _answers(
    head: IdentityToken, asked: Images | None, tokens_nd: Tensor
) -> list[Tensor] | list[None]:
    """Answer for all images with each token: (images, n_outputs, 1, 1)."""
    if asked is None:
        return [None] * len(tokens_nd)
    was_training = head.training
    head.eval()
    parts: list[list[Tensor]] = [[] for _ in tokens_nd]
    every = torch.arange(len(asked), device=tokens_nd.device)
    for index in torch.split(every, _SEEN_AT_ONCE):
        seen = head.see(asked.rows(index).inputs)
        for part, token_d in zip(parts, tokens_nd, strict=True):
            part.append(head.answer(seen, token_d.expand(len(index), -1)))
    head.train(was_training)
    return [torch.cat(part) for part in parts]

"""Who is adapted to what: a fixed test half, and nested supports that every mode shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from featstore.errors import InvalidInputError, invalid, not_found
from featstore.hashing import short_key

ALL = "all"
"""Every image that is not in the test half."""

Shots = int | str
"""How many images are learned from: a number, or `ALL`."""


class Shown(Protocol):
    """One instance: an image shows one or several of them."""

    @property
    def image_key(self) -> str:
        """Name of the image."""
        ...

    @property
    def group(self) -> str:
        """What it is alike with: its image, its video or its animal."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """One identity's instances by number: those measured on, and those learned from."""

    identity: str
    key: str  # names all of it, by its images
    test: tuple[int, ...]
    # Images of each seed in the order in which they are drawn, each as its instances.
    drawn: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def n_images(self) -> int:
        """Count the images that may be learned from."""
        return len(self.drawn[0])

    def support(self, shots: Shots, seed: int) -> tuple[int, ...]:
        """Give the instances of the first `shots` images of a seed: a larger number keeps them.

        Raises:
            InvalidInputError: There are fewer images.
        """
        images = self.drawn[seed]
        count = len(images) if shots == ALL else int(shots)
        if count > len(images):
            raise invalid("shots", shots, f"at most {len(images)} for {self.identity}")
        return tuple(instance for image in images[:count] for instance in image)

    def has(self, shots: Shots) -> bool:
        """Tell whether there are that many images."""
        return shots == ALL or int(shots) <= self.n_images


def parse_shots(texts: Sequence[str]) -> tuple[Shots, ...]:
    """Read numbers of images: "0", "5", "all".

    Raises:
        InvalidInputError: One is something else, or stands there twice.
    """
    found: list[Shots] = []
    for text in (each.strip() for each in texts):
        if text != ALL and not text.isdecimal():
            raise invalid("shots", text, f"a whole number of images, or {ALL}")
        found.append(text if text == ALL else int(text))
    if not found or len(set(found)) < len(found):
        raise invalid("shots", ",".join(texts), "one or more, each once")
    return tuple(found)


def make_design(
    identity: str, instances: Sequence[Shown], *, n_seeds: int, seed: int = 0
) -> Design:
    """Split an identity in two halves and draw supports from the second one.

    The test half is of whole groups, so that no video is in both; with one group it is of whole
    images. It is the same for all seeds, modes and shots. Each seed draws an order of the other
    images, whose first ones are a support: those of 5 shots are among those of 10.

    Args:
        identity: Whose instances they are.
        instances: In any order: the same instances give the same design.
        n_seeds: How many orders are drawn.
        seed: Of the halves and of the draws.

    Raises:
        InvalidInputError: They are of one image.
    """
    is_one_group = len({each.group for each in instances}) == 1
    by_unit: dict[str, list[int]] = {}
    for number, each in enumerate(instances):
        by_unit.setdefault(each.image_key if is_one_group else each.group, []).append(number)
    if len(by_unit) < 2:
        raise InvalidInputError(
            f"{identity} has {len(instances)} marked instances in {len(by_unit)} image, and a test "
            "half beside a support needs two. Leave it out of what is held out."
        )
    order = _shuffled(sorted(by_unit), identity, seed)
    n_test = (len(order) + 1) // 2
    test = sorted(number for unit in order[:n_test] for number in by_unit[unit])
    images: dict[str, list[int]] = {}
    for number in sorted(number for unit in order[n_test:] for number in by_unit[unit]):
        images.setdefault(instances[number].image_key, []).append(number)
    drawn = [_shuffled(sorted(images), identity, seed, 1 + one) for one in range(n_seeds)]
    sizes = {name: len(numbers) for name, numbers in images.items()}
    return Design(
        identity=identity,
        key=short_key([identity, [instances[number].image_key for number in test], sizes, drawn]),
        test=tuple(test),
        drawn=tuple(tuple(tuple(images[name]) for name in names) for names in drawn),
    )


def check_folds(folds: Sequence[Sequence[str]], known: Sequence[str]) -> None:
    """Refuse to hold out what is not there, or so much that too little is left to learn from.

    Args:
        folds: Identities that are held out together, fold by fold.
        known: All identities.

    Raises:
        NotFoundError: There is no such identity.
        InvalidInputError: There is no fold, one is empty, or fewer than two identities are left
            to learn from beside one to choose the learning rates on.
    """
    if not folds or not all(folds):
        raise invalid("holdout", folds, "one or more identities")
    for fold in folds:
        for name in fold:
            if name not in known:
                raise not_found("identity", name, known)
        n_left = len(set(known) - set(fold))
        if n_left < 3:
            expected = "few enough that three identities are left: two to learn from, and one on "
            expected += "which the learning rates are chosen"
            raise invalid("holdout", ", ".join(fold), expected, hint=f"{n_left} are left.")


def choose_validation(
    n_images: Mapping[str, int], held_out: Sequence[str], shots: Sequence[Shots]
) -> str:
    """Choose the identity on which every mode's learning rate is chosen; it is not learned from.

    It is the smallest one whose half has all the shots, so that it costs little; without such a
    one the largest.

    Args:
        n_images: Of every identity.
        held_out: Those that are measured, which choose nothing.
        shots: Those of the protocol.
    """
    most = max((int(one) for one in shots if one != ALL), default=1)
    left = {name: count for name, count in n_images.items() if name not in held_out}
    enough = {name: count for name, count in left.items() if count // 2 >= most}
    if enough:
        return min(enough, key=lambda name: (enough[name], name))
    return max(sorted(left), key=lambda name: left[name])


def _shuffled(names: Sequence[str], *decided_by: str | int) -> list[str]:
    """Shuffle by names and numbers alone, the same on every machine."""
    words = [number for part in decided_by for number in _numbers(part)]
    order = np.random.default_rng(words).permutation(len(names))
    return [names[index] for index in order]


def _numbers(part: str | int) -> list[int]:
    return [part] if isinstance(part, int) else [len(part), *part.encode()]

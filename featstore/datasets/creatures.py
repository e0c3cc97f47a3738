"""``creatures:n=2000,identities=40,seed=0``: made-up animals with keypoints, drawn on the spot.

An identity is a made-up species. Several identities share one kind of body (``kinds=8``), so that
a picture tells the kind but not the identity, and each marks its keypoints by a convention of its
own: every keypoint lies a little off the joint that is drawn, the same way in all pictures of the
identity. Only somebody who is told the identity can know where. This is a planted control for
methods that adapt to an identity, and ``offsets=`` says how it is planted:

* ``planted``: by identity;
* ``shuffled``: each picture takes the offsets of an identity drawn at random, so that knowing the
  identity helps nobody;
* ``none``: keypoints lie on the joints.

Pictures, crops and items are the same for all three, so that one extraction serves all of them.

An offset is (forward, up) along the picture, forward being where the animal looks to, in parts of
the longer side of its box: a mirror image of an identity is a picture of the same identity. Left
and right of a pair have the same offset. The offsets of all identities are mixtures of `FACTORS`
directions, equally long on average over the keypoints (root mean square: `SHIFT`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from featstore.crops import BOX_SCALE, square_crop
from featstore.datasets.common import (
    READERS,
    check_keys,
    npy_bytes,
    parse_argument,
    parse_size,
    parse_whole,
)
from featstore.datasets.creature_bodies import EDGES, NAMES, Kind, build_kind, individual, pose
from featstore.datasets.creature_model import Grain
from featstore.datasets.creature_paint import paint
from featstore.datasets.creature_view import View, look_at
from featstore.datasets.kept import KeptParts
from featstore.datasets.scenes import Dice
from featstore.datasets.skeletons import known_sigmas
from featstore.errors import invalid, not_found
from featstore.skeleton import Skeleton, swaps_from_names
from featstore.types import Item, Label

OFFSETS = ("planted", "shuffled", "none")
FACTORS = 4
SHIFT = 0.08
SKELETON = Skeleton(
    names=NAMES, edges=EDGES, swaps=swaps_from_names(NAMES), sigmas=known_sigmas(NAMES)
)
_IMAGE = "image"
_SIDES = (16, 4096)
_PARTS = tuple(dict.fromkeys(name.removeprefix("left_").removeprefix("right_") for name in NAMES))
_PART_OF = [_PARTS.index(name.removeprefix("left_").removeprefix("right_")) for name in NAMES]
_KINDS, _IDENTITIES, _BASIS, _PICTURES, _PAINT, _GRAIN, _DEALS = range(1, 8)  # sorts of dice


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a data set of made-up animals is drawn from."""

    n_images: int
    identities: int
    kinds: int
    seed: int
    size: tuple[int, int]
    offsets: str

    def __post_init__(self) -> None:
        if not (_SIDES[0] <= min(self.size) and max(self.size) <= _SIDES[1]):
            raise invalid("size", self.size, f"from {_SIDES[0]} to {_SIDES[1]} pixels a side")
        if self.offsets not in OFFSETS:
            raise invalid("offsets", self.offsets, f"one of {', '.join(OFFSETS)}")

    def text(self) -> str:
        """Write them as the argument of a data set."""
        return (
            f"n={self.n_images},identities={self.identities},kinds={self.kinds},seed={self.seed},"
            f"size={self.size[0]}x{self.size[1]},offsets={self.offsets}"
        )


class CreaturesReader:
    """Paints a picture when first asked; the first ones are kept, up to 512 MiB."""

    format = "creatures.v1"
    licence = "CC0-1.0"
    homepage = ""

    def __init__(self, options: Options, *, name: str) -> None:
        self.name = name
        self.spec = f"creatures.v1:{options.text()}"
        self._options = options
        self._numbers = {self._path(number): number for number in range(options.n_images)}
        self._kept = KeptParts()
        self._kind = lru_cache(maxsize=None)(
            lambda number: build_kind(Dice(options.seed, _KINDS, number))
        )
        self._offsets = lru_cache(maxsize=None)(
            lambda identity: identity_offsets(options.seed, identity)
        )

    def items(self) -> Sequence[Item]:
        """List all pictures: the first of every identity, then the second, and so on."""
        return [self._item(path, number) for path, number in self._numbers.items()]

    def read_image(self, item: Item) -> bytes:
        """Give one picture: the bytes of an .npy file, (H, W, 3) uint8."""
        number = self._number(item)
        known = self._kept.find(item.path, _IMAGE)
        if known is not None:
            return known
        kind, view = self._look(number)
        place = self._place(number)
        dice = Dice(self._options.seed, _PAINT, *place)
        grain = Grain(self._options.seed, _GRAIN, *place)
        picture = npy_bytes(paint(view, kind.coat, dice, grain))
        self._kept.keep(item.path, {_IMAGE: picture})
        return picture

    def read_label(self, item: Item, kind: str) -> Label:
        """Refuse: keypoints are no maps, and stand with the items."""
        raise not_found("label kind", kind, ())

    def skeleton(self) -> Skeleton:
        """Tell which keypoints there are."""
        return SKELETON

    def _item(self, path: str, number: int) -> Item:
        identity, turn = self._place(number)
        _, view = self._look(number)
        points = view.joints[:, :2] + self._offsets_in(number, view)
        x0, y0, x1, y1 = view.box
        return Item(
            path=path,
            splits=(_split(identity, turn),),
            label=_name(identity),
            group=path.removesuffix(".npy"),
            crop=square_crop(view.box, scale=BOX_SCALE, image_hw=self._options.size),
            attributes={
                "keypoints": [
                    [round(x, 2), round(y, 2), v]
                    for (x, y), v in zip(points.tolist(), view.seen, strict=True)
                ],
                "box": [round(edge, 2) for edge in view.box],
                "area": round((x1 - x0) * (y1 - y0), 2),
                "kind": identity % self._options.kinds,
            },
        )

    def _look(self, number: int) -> tuple[Kind, View]:
        identity, turn = self._place(number)
        dice = Dice(self._options.seed, _PICTURES, identity, turn)
        kind = individual(self._kind(identity % self._options.kinds), dice)
        return kind, look_at(pose(kind, dice), kind, self._options.size, dice)

    def _offsets_in(self, number: int, view: View) -> np.ndarray:
        """Give where the keypoints lie beside the joints, (keypoints, 2) pixels."""
        identity, turn = self._place(number)
        if self._options.offsets == "none":
            return np.zeros((len(NAMES), 2))
        if self._options.offsets == "shuffled":
            dice = Dice(self._options.seed, _DEALS, identity, turn)
            identity = dice.integer(0, self._options.identities - 1)
        return self._offsets(identity) * [view.facing * view.side, -view.side]

    def _place(self, number: int) -> tuple[int, int]:
        """Give the identity of a picture, and the how manieth of the identity's it is."""
        return number % self._options.identities, number // self._options.identities

    def _path(self, number: int) -> str:
        identity, turn = self._place(number)
        height, width = self._options.size
        folder = f"creatures_{self._options.seed}_{self._options.kinds}_{height}x{width}"
        return f"{folder}/{_name(identity)}/{turn:05d}.npy"

    def _number(self, item: Item) -> int:
        if item.path not in self._numbers:
            raise not_found("picture", item.path, list(self._numbers)[:3])
        return self._numbers[item.path]


def identity_offsets(seed: int, identity: int) -> np.ndarray:
    """Give an identity's convention.

    Args:
        seed: Of the data set.
        identity: Its number.

    Returns:
        (keypoints, 2) float64: forward and up, in longer sides of the box.
    """
    basis = Dice(seed, _BASIS)
    directions = np.array(
        [[(basis.uniform(-1, 1), basis.uniform(-1, 1)) for _ in _PARTS] for _ in range(FACTORS)]
    )[:, _PART_OF]
    dice = Dice(seed, _IDENTITIES, identity)
    offsets = np.zeros((len(NAMES), 2))
    for direction in directions:
        offsets += dice.uniform(-1, 1) * direction
    length = math.sqrt(float((offsets * offsets).sum()) / len(NAMES))
    return offsets * (SHIFT / length)


def _name(identity: int) -> str:
    return f"creature_{identity:03d}"


def _split(identity: int, turn: int) -> str:
    """Give 7 of 10 pictures to train, 1 to val, 2 to test; each identity starts elsewhere."""
    return (*["train"] * 7, "val", "test", "test")[(turn + 7 * identity) % 10]


@READERS.register("creatures.v1")
def open_creatures(argument: str, *, name: str) -> CreaturesReader:
    """Open ``n=2000,identities=40,kinds=8,seed=0,size=224,offsets=planted``, each part optional.

    Raises:
        InvalidInputError: A value is not acceptable.
        NotFoundError: A key is unknown.
    """
    parsed = parse_argument(argument)
    if parsed.path:
        raise invalid("creatures", argument, "options alone, like creatures:n=2000,seed=0")
    defaults = {
        "n": "2000",
        "identities": "40",
        "kinds": "8",
        "seed": "0",
        "size": "224",
        "offsets": "planted",
    }
    check_keys(parsed, tuple(defaults), reader="creatures")
    given = {**defaults, **parsed.options}
    options = Options(
        n_images=parse_whole(given["n"], name="n", least=10),
        identities=parse_whole(given["identities"], name="identities", least=1),
        kinds=parse_whole(given["kinds"], name="kinds", least=1),
        seed=parse_whole(given["seed"], name="seed", least=0),
        size=parse_size(given["size"], name="size"),
        offsets=given["offsets"],
    )
    return CreaturesReader(options, name=name)

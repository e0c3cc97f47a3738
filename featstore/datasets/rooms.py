"""``rooms:n=250,seed=0``: made-up rooms with exact depth, made on the spot.

Scenes are furnished and ray-cast with NumPy. Depth is the distance along the camera's optical
axis (z-depth, as depth cameras give it) in metres at each pixel's centre. Two pictures show each
scene; every fifth scene is ``test``, the others are ``train``, and a scene is a group. Growing `n`
keeps the pictures and splits there are, from 10 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from featstore.datasets.common import (
    READERS,
    check_groups,
    check_keys,
    npy_bytes,
    parse_argument,
    parse_size,
    parse_whole,
)
from featstore.datasets.furnish import build_camera, build_scene
from featstore.datasets.kept import KeptParts
from featstore.datasets.raycast import N_PLANES, cast
from featstore.datasets.scenes import CLASSES, Camera
from featstore.datasets.shading import shade
from featstore.errors import invalid, not_found
from featstore.types import Item, Label

VIEWS_PER_SCENE = 2
KINDS = ("depth", "classes", "instances")
_SIDES = (16, 4096)


class RoomsReader:
    """Renders a picture with its labels when first asked; the first are kept, up to 512 MiB."""

    format = "rooms.v1"
    licence = "CC0-1.0"
    homepage = ""

    def __init__(self, *, name: str, n_images: int, seed: int, size: tuple[int, int]) -> None:
        if n_images < 2:
            raise invalid("n", n_images, "at least 2: one image to train and one to test")
        if not (_SIDES[0] <= min(size) and max(size) <= _SIDES[1]):
            raise invalid("size", size, f"from {_SIDES[0]} to {_SIDES[1]} pixels on each side")
        self.name = name
        self.spec = f"rooms.v1:n={n_images},seed={seed},size={size[0]}x{size[1]}"
        self._seed = seed
        self._size = size
        self._places = _places(n_images)
        self._by_path = {self._path(*place): place for place in self._places}
        self._kept = KeptParts()
        self._scene = lru_cache(maxsize=64)(lambda number: build_scene(self._seed, number))

    def items(self) -> Sequence[Item]:
        """List all pictures, scene by scene."""
        test = _test_scenes(self._places[-1][0] + 1)
        items = [
            Item(
                path=path,
                splits=("test" if number in test else "train",),
                group=f"seed_{self._seed}/scene_{number:05d}",
                attributes={"focal": self._camera(number, view).focal * self._size[1]},
                label_kinds=KINDS,
            )
            for path, (number, view) in self._by_path.items()
        ]
        check_groups(items, source=self.spec)
        return items

    def read_image(self, item: Item) -> bytes:
        """Give one picture: the bytes of an .npy file, (H, W, 3) uint8."""
        return self._part(item, "image")

    def read_label(self, item: Item, kind: str) -> Label:
        """Give depth in metres, or the class (see CLASSES) or instance of each pixel, 0 = room."""
        if kind not in KINDS:
            raise not_found("label kind", kind, KINDS)
        return Label(kind=kind, encoding="npy", data=self._part(item, kind), source="exact")

    def _part(self, item: Item, part: str) -> bytes:
        """Render a picture and its labels, which one casting of rays gives together."""
        known = self._kept.find(item.path, part)
        if known is not None:
            return known
        picture = self._render(*self._place(item))
        self._kept.keep(item.path, picture)
        return picture[part]

    def _render(self, number: int, view: int) -> dict[str, bytes]:
        scene, _ = self._scene(number)
        camera = self._camera(number, view)
        hits = cast(scene, camera, self._size)
        surfaces = [*range(N_PLANES), *(solid.surface for solid in scene.solids)]
        classes = [scene.surfaces[surface].class_id for surface in surfaces]
        instances = [0] * N_PLANES + [solid.instance for solid in scene.solids]
        return {
            "image": npy_bytes(shade(scene, camera, hits)),
            "depth": npy_bytes(hits.depth),
            "classes": npy_bytes(np.array(classes, np.uint8)[hits.thing]),
            "instances": npy_bytes(np.array(instances, np.uint8)[hits.thing]),
        }

    def class_names(self) -> tuple[str, ...]:
        """Name the numbers of the "classes" label."""
        return CLASSES

    def _camera(self, number: int, view: int) -> Camera:
        scene, circles = self._scene(number)
        return build_camera(self._seed, number, view, scene=scene, circles=circles)

    def _path(self, number: int, view: int) -> str:
        folder = f"rooms_{self._seed}_{self._size[0]}x{self._size[1]}"
        return f"{folder}/scene_{number:05d}/view_{view}.npy"

    def _place(self, item: Item) -> tuple[int, int]:
        if item.path not in self._by_path:
            raise not_found("picture", item.path, list(self._by_path)[:3])
        return self._by_path[item.path]


def _places(n_images: int) -> list[tuple[int, int]]:
    """Give the scene and view of each picture; few pictures still show five scenes."""
    views = min(VIEWS_PER_SCENE, max(n_images // 5, 1))
    return [(number // views, number % views) for number in range(n_images)]


def _test_scenes(n_scenes: int) -> frozenset[int]:
    return frozenset(range(4, n_scenes, 5)) or frozenset({n_scenes - 1})


@READERS.register("rooms.v1")
def open_rooms(argument: str, *, name: str) -> RoomsReader:
    """Open ``n=250,seed=0,size=240x320``, each part optional.

    Raises:
        InvalidInputError: A value is not acceptable.
        NotFoundError: A key is unknown.
    """
    parsed = parse_argument(argument)
    if parsed.path:
        raise invalid("rooms", argument, "options alone, like rooms:n=250,seed=0")
    check_keys(parsed, ("n", "seed", "size"), reader="rooms")
    options = {"n": "250", "seed": "0", "size": "240x320", **parsed.options}
    return RoomsReader(
        name=name,
        n_images=parse_whole(options["n"], name="n", least=1),
        seed=parse_whole(options["seed"], name="seed", least=0),
        size=parse_size(options["size"], name="size"),
    )

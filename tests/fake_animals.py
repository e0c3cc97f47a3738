"""Generated animals for tests: a bright spot, and ears whose offset only the identity tells."""

from __future__ import annotations

import numpy as np

from featstore.skeleton import Skeleton
from featstore.types import Box, Item
from tests.fakes import FakeReader, npy

SKELETON = Skeleton(
    names=("nose", "left_ear", "right_ear"),
    edges=((0, 1), (0, 2)),
    swaps=((1, 2),),
    sigmas=(0.05, 0.05, 0.05),
)
SIZE = 32
NAMES = tuple("cat dog elk fox hare lynx mole newt otter puma rat seal".split())


class Animals(FakeReader):
    """Each image shows one spot; where its ears are, pixels do not tell, but who it is does."""

    def __init__(
        self, n_images: int = 48, *, n_identities: int = 4, crop: Box | None = None, **options
    ) -> None:
        super().__init__(n_images, source_hw=(SIZE, SIZE), **options)
        self.identities = NAMES[:n_identities]
        self.crop = crop

    def items(self) -> list[Item]:
        return [
            Item(
                path=f"{number:05d}.npy",
                splits=("test",) if number // len(self.identities) % 4 == 3 else ("train",),
                label=self.identities[number % len(self.identities)],
                crop=self.crop,
                attributes={
                    "keypoints": self.keypoints(number),
                    "box": [0, 0, SIZE, SIZE],
                    "area": SIZE * SIZE,
                },
            )
            for number in range(self.n_images)
        ]

    def skeleton(self) -> Skeleton:
        return SKELETON

    def nose(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number]).uniform(10, 22, 2)

    def offset(self, identity: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 99, identity]).uniform(-9, 9, 2)

    def keypoints(self, number: int) -> list[list[float]]:
        nose, offset = self.nose(number), self.offset(number % len(self.identities))
        places = (nose, nose + offset, nose - offset)
        return [[*place.tolist(), 2] for place in places]

    def read_image(self, item: Item) -> bytes:
        x, y = self.nose(int(item.path.partition(".")[0]))
        rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
        spot = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 40)
        pixels = np.stack([spot, columns / SIZE, rows / SIZE], axis=-1)
        return npy((pixels * 255).round().astype(np.uint8))

"""Small stand-ins that do the real thing on little data: a data set and a backbone of NumPy."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featstore.assign import Framing
from featstore.codecs import encode
from featstore.errors import NotFoundError
from featstore.extraction import Extraction, ExtractReport
from featstore.feature_sets import FinalNorm, NewFeatureSet
from featstore.geometry import place
from featstore.hashing import image_key, pixel_hash
from featstore.images import decode
from featstore.plan import ExtractPlan, RunOptions
from featstore.planning import select_items
from featstore.shard_job import Loaded, TapBlock
from featstore.shared_shards import Crew
from featstore.skeleton import Skeleton
from featstore.sources import Readers
from featstore.store import StoreFolder
from featstore.tail import TailWeights
from featstore.types import (
    Box,
    Item,
    Label,
    Placement,
    ProgressCallback,
    TapShape,
    ignore_progress,
)

GRID = (4, 4)
DIM = 8


def npy(array: np.ndarray) -> bytes:
    """Give an array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class FakeReader:
    """Images whose red channel is a ramp that tells depth: easy to learn, exact to check."""

    format = "fake.v1"
    licence = ""
    homepage = ""

    def __init__(
        self,
        n_images: int = 20,
        *,
        name: str = "fake",
        bad: Sequence[int] = (),
        seed: int = 0,
        source_hw: tuple[int, int] = (32, 48),
        n_groups: int = 10,
    ) -> None:
        self.name = name
        self.spec = f"fake:{name}"
        self.n_images = n_images
        self.bad = set(bad)
        self.seed = seed
        self.source_hw = source_hw
        self.n_groups = n_groups

    def items(self) -> list[Item]:
        return [
            Item(
                path=f"{number:05d}.npy",
                splits=("train",) if number % 5 else ("test",),
                group=f"scene{number % self.n_groups}",
                label_kinds=("depth",),
            )
            for number in range(self.n_images)
        ]

    def depth(self, path: str) -> np.ndarray:
        """Give the exact depth in metres, 1 to 5, as a tilted plane."""
        number = int(path.partition(".")[0])
        random = np.random.default_rng([self.seed, number])
        height, width = self.source_hw
        x = np.linspace(0, 1, width) * random.uniform(-1, 1)
        y = np.linspace(0, 1, height)[:, None] * random.uniform(-1, 1)
        return (random.uniform(2, 4) + x + y).clip(1, 5).astype(np.float32)

    def read_image(self, item: Item) -> bytes:
        number = int(item.path.partition(".")[0])
        if number in self.bad:  # truncated
            return npy(np.full((4, 4, 3), number, np.uint8))[:-7]
        red = (self.depth(item.path) * 50).round().astype(np.uint8)
        green = np.full_like(red, number % 256)
        return npy(np.stack([red, green, 255 - red], axis=-1))

    def read_label(self, item: Item, kind: str) -> Label:
        return Label(kind=kind, encoding="npy", data=npy(self.depth(item.path)), source="exact")


class Things(FakeReader):
    """Depth cut into steps: each step is a class, and those that are near are things.

    Keypoints are where the mean depth says: a nose between two ears.
    """

    def items(self) -> list[Item]:
        kinds = ("depth", "classes", "instances")
        return [
            Item(
                path=i.path,
                splits=i.splits,
                group=i.group,
                label_kinds=kinds,
                label=("dark", "light")[int(self.depth(i.path).mean() > 3)],
                attributes=self.animal(i.path),
            )
            for i in super().items()
        ]

    def animal(self, path: str) -> dict[str, Any]:
        """Give keypoints, the left ear hidden, and a box around them."""
        height, width = self.source_hw
        x = width * (float(self.depth(path).mean()) - 1) / 4
        ears = [[x - 2, height / 2 - 3, 1], [x + 2, height / 2 - 3, 2]]
        box = [x - 3, height / 2 - 4, x + 3, height / 2 + 1]
        return {"keypoints": [[x, height / 2, 2], *ears], "box": box}

    def skeleton(self) -> Skeleton:
        return Skeleton(
            names=("nose", "left_ear", "right_ear"),
            edges=((0, 1), (0, 2)),
            swaps=((1, 2),),
            sigmas=(0.1, 0.1, 0.1),
        )

    def class_names(self) -> tuple[str, ...]:
        return ("near", "middle", "far", "farthest")

    def read_label(self, item: Item, kind: str) -> Label:
        if kind == "depth":
            return super().read_label(item, kind)
        steps = np.clip(self.depth(item.path) - 1, 0, 3).astype(np.int32)
        if kind == "instances":
            steps = np.where(steps == 3, 0, steps + 1)
            steps[:12, :18] = 9  # a thing in each image
        return Label(kind=kind, encoding="npy", data=npy(steps), source="exact")


def fake_plan(**changes: Any) -> ExtractPlan:
    """Give a plan like a real one."""
    values: dict[str, Any] = {
        "architecture": "fake_net",
        "tag": "fake",
        "weights_sha256": hashlib.sha256(b"fake").hexdigest(),
        "image_size": (16, 16),
        "resize": "squash",
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "position_grid": "none",
    }
    return ExtractPlan(**{**values, **changes})


SHAPES = (
    TapShape(tap="block:0", dim=DIM, grid=GRID, n_prefix=1),
    TapShape(tap="norm", dim=DIM, grid=GRID, n_prefix=1),
    TapShape(tap="norm.mean", dim=DIM, grid=None),
)


class FakeSource:
    """Features that are plain functions of the image: means of cells, times fixed numbers."""

    def __init__(
        self,
        readers: Readers,
        *,
        delay_s: float = 0.0,
        scale: Mapping[str, float] | None = None,
        dtype: str = "float16",
    ) -> None:
        self._readers = readers
        self._delay_s = delay_s
        self._scale = scale or {}
        self._dtype = dtype
        self.n_loads = 0
        self.n_computed = 0

    def load(self, line: Mapping[str, Any]) -> Loaded:
        self.n_loads += 1
        reader, item = self._readers.find(line["dataset"], line["path"])
        data = reader.read_image(item)
        assert image_key(data) == line["image_key"]
        pixels = decode(data)
        x0, y0, x1, y1 = (int(line[f"box_{name}"]) for name in ("x0", "y0", "x1", "y1"))
        shown = pixels[y0:y1, x0:x1]
        height, width = shown.shape[:2]
        cells = shown[: height // 4 * 4, : width // 4 * 4].astype(np.float32)
        cells = cells.reshape(4, height // 4, 4, width // 4, 3).mean(axis=(1, 3)) / 50
        if line["is_flipped"]:
            cells = cells[:, ::-1]
        return Loaded(value=cells.reshape(16, 3), pixel_hash=pixel_hash(pixels))

    def submit(
        self, values: Sequence[Any], taps: Sequence[str]
    ) -> Callable[[], dict[str, TapBlock]]:
        if self._delay_s:
            time.sleep(self._delay_s)
        self.n_computed += len(values)
        mix = np.random.default_rng(7).standard_normal((3, DIM)).astype(np.float32)
        tokens = np.stack(values) @ mix
        return lambda: {tap: self._block(tap, tokens) for tap in taps}

    def _block(self, tap: str, tokens: np.ndarray) -> TapBlock:
        tokens = tokens * np.float32(self._scale.get(tap, 2.0 if tap == "norm" else 1.0))
        main = tokens.mean(axis=1) if tap.endswith(".mean") else tokens
        arrays = {"pooled" if main.ndim == 2 else "patch": main}
        if main.ndim == 3:
            arrays["prefix"] = tokens[:, :1] + 1
        axes = tuple(range(1, main.ndim))
        with np.errstate(over="ignore"):
            stored = {name: self._encode(values) for name, values in arrays.items()}
        return TapBlock(
            arrays=stored,
            abs_max=np.abs(main).max(axis=axes),
            mean=main.mean(axis=axes),
            std=main.std(axis=axes),
        )

    def _encode(self, values: np.ndarray) -> np.ndarray:
        # What overflows is the extraction's to reject; the codec would refuse it here.
        return (
            values.astype(np.float16) if self._dtype == "float16" else encode(values, self._dtype)
        )


def fake_extract(
    path: Path,
    readers: Sequence[Any],
    *,
    options: RunOptions | None = None,
    shapes: Sequence[TapShape] = SHAPES,
    shard_rows: int = 8,
    batch_size: int = 3,
    delay_s: float = 0.0,
    scale: Mapping[str, float] | None = None,
    plan: ExtractPlan | None = None,
    backbone: Mapping[str, Any] | None = None,
    tail: TailWeights | None = None,
    norm_weight: float = 1.0,
    progress: ProgressCallback = ignore_progress,
    crew: Crew | None = None,
) -> ExtractReport:
    """Run the real extraction with the fake backbone."""
    options = options or RunOptions(n_threads=2)
    plan = plan or fake_plan()
    new = NewFeatureSet(
        key=plan.key(),
        name="fake@16",
        dtype=plan.dtype,
        shard_rows=shard_rows,
        plan=plan,
        backbone=backbone or {"name": "fake"},
        provenance={"batch_size": batch_size},
        final_norm=FinalNorm(
            kind="layer_norm",
            eps=1e-6,
            weight=np.full(DIM, norm_weight, np.float32),
            bias=np.zeros(DIM),
        ),
        tail=tail,
    )
    extraction = Extraction(
        path,
        readers,
        select_items(readers, options),
        options=options,
        progress=progress,
        began=time.perf_counter(),
    )
    framing = Framing(input_hw=plan.image_size, resize=plan.resize)
    store = extraction.open_store()
    source = FakeSource(Readers(store, readers), delay_s=delay_s, scale=scale, dtype=plan.dtype)
    return extraction.run(
        store, new, shapes, framing=framing, source=source, batch_size=batch_size, crew=crew
    )


@dataclass(frozen=True, kw_only=True)
class FakeSpec:
    """A fake source for the processes of a cluster; one image may end whoever reads it."""

    readers: tuple[FakeReader, ...]
    delay_s: float = 0.0
    poison: str = ""  # path of an image
    misses: str = ""  # a sentence: opening fails with it

    def open(self, store: StoreFolder, *, n_threads: int) -> FakeSource:
        assert n_threads >= 1
        if self.misses:
            raise NotFoundError(self.misses)
        readers = Readers(store, self.readers)
        return PoisonSource(readers, delay_s=self.delay_s, poison=self.poison)


class PoisonSource(FakeSource):
    """A source that aborts its process at one image."""

    def __init__(self, readers: Readers, *, delay_s: float, poison: str) -> None:
        super().__init__(readers, delay_s=delay_s)
        self._poison = poison

    def load(self, line: Mapping[str, Any]) -> Loaded:
        if line["path"] == self._poison:
            os.abort()
        return super().load(line)


def fake_forward(
    images: Sequence[np.ndarray], crops: Sequence[Box | None] | None = None, /
) -> list[tuple[dict[str, np.ndarray], Placement]]:
    """Give the tap "norm" of decoded images, as `FakeSource` makes it."""
    mix = np.random.default_rng(7).standard_normal((3, DIM)).astype(np.float32)
    found = []
    for pixels, crop in zip(images, crops or [None] * len(images), strict=True):
        placement = place(
            source_hw=(pixels.shape[0], pixels.shape[1]),
            crop=crop,
            input_hw=(16, 16),
            resize="squash",
            view="plain",
        )
        x0, y0, x1, y1 = map(int, placement.box)
        shown = pixels[y0:y1, x0:x1]
        height, width = shown.shape[:2]
        cells = shown[: height // 4 * 4, : width // 4 * 4].astype(np.float32)
        cells = cells.reshape(4, height // 4, 4, width // 4, 3).mean(axis=(1, 3)) / 50
        tokens = cells.reshape(16, 3) @ mix * 2
        found.append(({"norm": tokens, "norm/prefix": tokens[:1] + 1}, placement))
    return found


def content(path: Path) -> dict[str, str]:
    """Hash every file of a store that its promise of equal bytes covers."""
    left_out = ("runs", ".locks", "index.duckdb", "targets")
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not str(file.relative_to(path)).startswith(left_out)
    }

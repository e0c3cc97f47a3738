"""Small data sets of animals with keypoints, in the layouts that are found in the wild."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from tests.datasets import save_image

NAMES = ("left_eye", "right_eye", "nose")
HW = (60, 80)


def category(number: int, name: str, **more: Any) -> dict[str, Any]:
    skeleton = [[1, 2], [1, 3], [2, 3]]
    fixed = {"id": number, "name": name, "supercategory": "Canidae", "keypoints": list(NAMES)}
    return {**fixed, "skeleton": skeleton, **more}


def animal(number: int, image_id: int, category_id: int = 1, **more: Any) -> dict[str, Any]:
    """Make one annotation: two points seen, one hidden, in a box of 20x10 pixels."""
    x, y = 10.5 + number, 20.25
    points = [x, y, 2, x + 12, y + 1, 2, x + 6, y + 5, 1]
    fixed = {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
    box = [x - 4, y - 3, 20, 10]
    fixed |= {"bbox": box, "area": 150, "num_keypoints": 3, "keypoints": points}
    return {**fixed, **more}


def image(number: int, **more: Any) -> dict[str, Any]:
    fixed = {"id": number, "file_name": f"{number:012d}.jpg", "height": HW[0], "width": HW[1]}
    return {**fixed, "license": 1, "background": 5, **more}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def keypoint_json(
    images: list[dict[str, Any]], animals: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    categories = [category(1, "dog"), category(2, "fox")]
    fixed = {"info": {"year": 2021}, "licenses": [], "categories": categories}
    return {**fixed, "images": images, "annotations": animals, **more}


def write_ap10k(root: Path, parts: dict[str, list[int]]) -> None:
    """Write images and files as AP-10K has them; odd images have a dog, the others two foxes."""
    for part, numbers in parts.items():
        animals = []
        for number in numbers:
            path = root / "data" / f"{number:012d}.jpg"
            if not path.exists():
                save_image(path, seed=number, hw=HW)
            animals.append(animal(10 * number, number, 2 - number % 2))
            if number % 2 == 0:
                animals.append(animal(10 * number + 1, number, 2))
        content = keypoint_json([image(number) for number in numbers], animals)
        write_json(root / "annotations" / f"ap10k-{part}.json", content)


def make_ap10k(root: Path) -> str:
    splits = {"train-split1": [1, 2], "val-split1": [3], "test-split1": [4]}
    write_ap10k(root, splits | {"train-split2": [3, 4], "val-split2": [1], "test-split2": [2]})
    return f"ap10k:{root}"


PARTS = ("nose", "left_ear", "right_ear")
CONFIG = """
Task: reaching
scorer: anna
multianimalproject: false
bodyparts:
- nose
- left_ear
- right_ear
skeleton:
- - nose
  - left_ear
- - left_ear
  - right_ear
- - objectA
  - nose
"""


def dlc_rows(
    files: list[str], *, individuals: tuple[str, ...] = (), n_index: int = 3
) -> list[list[str]]:
    """Make the rows of a table; in every image, the last point of the first animal is not there."""
    bodyparts = [
        (who, part, axis) for who in individuals or ("",) for part in PARTS for axis in "xy"
    ]
    bodyparts += [("single", "corner", axis) for axis in "xy"] if individuals else []
    pad = [""] * (n_index - 1)
    rows = [["scorer", *pad, *["anna"] * len(bodyparts)]]
    if individuals:
        rows.append(["individuals", *pad, *[who for who, _, _ in bodyparts]])
    rows.append(["bodyparts", *pad, *[part for _, part, _ in bodyparts]])
    rows.append(["coords", *pad, *[axis for _, _, axis in bodyparts]])
    for number, file in enumerate(files):
        index = (
            ["labeled-data", "video", file] if n_index == 3 else [f"labeled-data\\video\\{file}"]
        )
        cells = [f"{10 + 4 * n + n * n % 7 + number}.25" for n in range(len(bodyparts))]
        cells[4:6] = ["", ""]
        rows.append([*index, *cells])
    return rows


def write_rows(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")


def make_dlc(root: Path) -> str:
    (root / "config.yaml").write_text(CONFIG)
    for video in ("one", "two"):
        files = [f"img{number:04d}.png" for number in (3, 12)]
        folder = root / "labeled-data" / video
        for number, file in enumerate(files):
            save_image(folder / file, seed=number + len(video) * 7 + ord(video[0]), hw=HW)
        write_rows(folder / "CollectedData_anna.csv", dlc_rows(files))
    return f"dlc:{root}"


def write_pandas(path: Path, rows: list[list[str]], *, n_index: int = 3) -> None:
    """Write the table of a CSV as pandas does in its fixed format, in two blocks of columns."""
    n_head = next(n for n, row in enumerate(rows) if row[0] == "coords") + 1
    head = [row[n_index:] for row in rows[:n_head]]
    body = [[float(cell or "nan") for cell in row[n_index:]] for row in rows[n_head:]]
    numbers = np.array(body)
    with h5py.File(path, "w") as file:
        group = file.create_group("df_with_missing")
        _write_axis(group, "axis0", list(zip(*head, strict=True)))
        _write_axis(group, "axis1", [tuple(row[:n_index]) for row in rows[n_head:]])
        whole, rest = [0, 3], [n for n in range(len(head[0])) if n not in (0, 3)]
        for block, columns in (("block0", rest), ("block1", whole)):
            names = list(zip(*[[level[n] for n in columns] for level in head], strict=True))
            _write_axis(group, f"{block}_items", names)
            group[f"{block}_values"] = numbers[:, columns]


def _write_axis(group: h5py.Group, name: str, values: list[tuple[str, ...]]) -> None:
    if len(values[0]) == 1:
        group[name] = np.array([value[0].encode() for value in values])
        return
    for number, level in enumerate(zip(*values, strict=True)):
        known = sorted(set(level))
        group[f"{name}_level{number}"] = np.array([value.encode() for value in known])
        group[f"{name}_label{number}"] = np.array([known.index(value) for value in level], "i1")


EDGE = {"py/reduce": [{"py/type": "sleap.skeleton.EdgeType"}, {"py/tuple": [1]}]}
SYMMETRY = {"py/reduce": [{"py/type": "sleap.skeleton.EdgeType"}, {"py/tuple": [2]}]}
FRAME = np.dtype(
    [("frame_id", "u8"), ("video", "u4"), ("frame_idx", "u8")]
    + [(f"instance_id_{end}", "u8") for end in ("start", "end")]
)
INSTANCE = np.dtype(
    [("instance_id", "i8"), ("instance_type", "u1"), ("frame_id", "u8"), ("skeleton", "u4")]
    + [("track", "i4"), ("from_predicted", "i8"), ("score", "f4")]
    + [(f"point_id_{end}", "u8") for end in ("start", "end")]
)
POINT = np.dtype([("x", "f8"), ("y", "f8"), ("visible", "?"), ("complete", "?")])


def sleap_skeleton(links: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Describe head, wing_a and wing_b; the nodes of all skeletons stand in another order."""
    if links is None:
        links = [
            {"source": 2, "target": 0, "type": EDGE},
            {"source": 0, "target": 1, "type": SYMMETRY},
            {"source": 2, "target": 1, "type": {"py/id": 1}},
            {"source": 1, "target": 0, "type": {"py/id": 2}},
        ]
    names = [{"name": name, "weight": 1.0} for name in ("wing_a", "wing_b", "head")]
    nodes = [{"id": 2}, {"id": 0}, {"id": 1}]
    return {"skeletons": [{"nodes": nodes, "links": links}], "nodes": names}


def write_sleap(
    path: Path,
    *,
    video: dict[str, Any] | None = None,
    frames: tuple[int, ...] = (4, 2),
    version: float = 1.2,
    about: dict[str, Any] | None = None,
) -> None:
    """Write a file of SLEAP: in each frame two animals of people and a predicted one between."""
    points, instances, lines = [], [], []
    for frame_id, frame in enumerate(frames):
        for n, kind in enumerate((0, 1, 0)):
            number = len(instances)
            where = (len(points), len(points) + 3) if kind == 0 else (0, 3)
            track = 0 if n == 0 else -1
            instances.append((number, kind, frame_id, 0, track, -1, 0.5 * kind, *where))
            if kind == 0:
                x, y = 10 + frame + 15 * n, 20.5
                hidden = n == 2
                points += [(x, y, True, True), (x + 4, y + 7, True, True)]
                points += [(np.nan, np.nan, False, False) if not hidden else (x, 9, False, True)]
        lines.append((frame_id, 0, frame, 3 * frame_id, 3 * frame_id + 3))
    entry = video or {"backend": {"filename": ".", "dataset": "video0/video"}}
    with h5py.File(path, "w") as file:
        group = file.create_group("metadata")
        group.attrs["format_id"] = version
        group.attrs["json"] = np.bytes_(json.dumps(about or sleap_skeleton()).encode())
        file["frames"] = np.array(lines, FRAME)
        file["instances"] = np.array(instances, INSTANCE)
        file["points"] = np.array(points, POINT)
        file["tracks_json"] = [json.dumps([0, "anna"]).encode()]
        file["videos_json"] = [json.dumps(entry).encode()]


def embed_frames(path: Path, pictures: dict[int, bytes], **attributes: Any) -> None:
    """Put encoded frames into a file of SLEAP, as it does itself."""
    with h5py.File(path, "a") as file:
        kind = h5py.special_dtype(vlen=np.dtype("int8"))
        frames = file.create_dataset("video0/video", (len(pictures),), dtype=kind)
        for row, data in enumerate(pictures.values()):
            frames[row] = np.frombuffer(data, np.int8)
        frames.attrs.update({"format": "png", "height": HW[0], "width": HW[1], **attributes})
        file["video0/frame_numbers"] = list(pictures)


def png(seed: int) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 255, (*HW, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue(), pixels


def make_sleap(root: Path) -> str:
    write_sleap(root / "flies.pkg.slp", version=1.4)
    embed_frames(root / "flies.pkg.slp", {4: png(4)[0], 2: png(2)[0]})
    return f"sleap:{root / 'flies.pkg.slp'}"


ANIMAL_MAKERS: dict[str, Callable[[Path], str]] = {
    "ap10k.v1": make_ap10k,
    "dlc.v1": make_dlc,
    "sleap.v1": make_sleap,
}

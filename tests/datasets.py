"""Small data sets of every format, written to a folder: one maker a registered reader."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from PIL import Image


def save_image(path: Path, seed: int = 0, hw: tuple[int, int] = (24, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*hw, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_depth(path: Path, seed: int = 0, hw: tuple[int, int] = (24, 32)) -> np.ndarray:
    """Write a depth PNG in millimetres and give its numbers; the first row has no value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    millimetres = np.random.default_rng(seed).integers(500, 9000, hw).astype(np.uint16)
    millimetres[0] = 0
    Image.fromarray(millimetres).save(path)
    return millimetres


def npy_bytes(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def make_nyu(root: Path) -> str:
    for split, n_images in (("train", 3), ("test", 2)):
        lines = []
        for number in range(n_images):
            image, depth = f"kitchen/rgb_{number}.png", f"kitchen/sync_depth_{number}.png"
            save_image(root / split / image, seed=number + 10 * n_images)
            save_depth(root / split / depth, seed=number)
            lines.append(f"{image} {depth} 518.8579")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return f"nyu:{root}"


def make_folder(root: Path) -> str:
    for split in ("train", "test"):
        for number, label in enumerate(("cat", "dog", "dog")):
            save_image(root / split / label / f"{number}.png", seed=number)
    return f"folder:{root}"


def make_manifest(root: Path) -> str:
    lines = ["path,split,label,group,timestamp,x0,y0,x1,y1,depth,iso,note"]
    for number in range(4):
        save_image(root / "images" / f"{number}.png", seed=number)
        save_depth(root / "depth" / f"{number}.png", seed=number)
        split = "train" if number < 2 else "test"
        lines.append(
            f"images/{number}.png,{split},cat,{split}_scene,2024-05-01T12:00:0{number},"
            f"1,2,20,22.5,depth/{number}.png,100,fine"
        )
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return f"manifest:{root / 'table.csv'}"


def save_indices(path: Path, values: np.ndarray, *, palette: bool = False) -> None:
    """Write an index PNG, grey or with a palette that would change the numbers if applied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 255, 768, dtype=np.uint8).tobytes())
    image.save(path)


def index_map(seed: int, high: int, hw: tuple[int, int] = (24, 32)) -> np.ndarray:
    """Numbers below `high` in blocks of 4 pixels; the first row is 255."""
    blocks = np.random.default_rng(seed).integers(0, high, (hw[0] // 4, hw[1] // 4), dtype=np.uint8)
    values = np.kron(blocks, np.ones((4, 4), np.uint8))
    values[0] = 255
    return values


VOC_OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>{truncated}</truncated>
<occluded>0</occluded><difficult>{difficult}</difficult>
<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin><ymax>{y1}</ymax><ymin>{y0}</ymin></bndbox>
<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox>
</part></object>"""


def write_voc(root: Path, splits: dict[str, int], *, boxes: bool = True) -> None:
    """Write images and lists of VOC; the boxes are a whole image and a difficult dog."""
    for split, n_images in splits.items():
        names = [f"{split}_{number:06d}" for number in range(n_images)]
        for number, name in enumerate(names):
            save_image(root / "JPEGImages" / f"{name}.jpg", seed=number + 10 * n_images)
            classes, objects = index_map(number, 21), index_map(number + 7, 4)
            save_indices(root / "SegmentationClass" / f"{name}.png", classes, palette=True)
            save_indices(root / "SegmentationObject" / f"{name}.png", objects, palette=True)
            cat = VOC_OBJECT.format(name="cat", truncated=1, difficult=0, x0=1, y0=1, x1=32, y1=24)
            dog = VOC_OBJECT.format(
                name="dog", truncated=0, difficult=1, x0="5.5", y0=6, x1=5.5, y1=9
            )
            if boxes:
                (root / "Annotations").mkdir(exist_ok=True)
                (root / "Annotations" / f"{name}.xml").write_text(
                    f"<annotation><filename>{name}.jpg</filename>{cat}{dog}</annotation>"
                )
        write_list(root, split, names)


def write_list(root: Path, split: str, names: list[str], folder: str = "Segmentation") -> None:
    path = root / "ImageSets" / folder / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def make_voc(root: Path) -> str:
    write_voc(root, {"train": 3, "val": 2})
    return f"voc:{root}"


def coco_annotation(number: int, image_id: int, segmentation: object, **more: object) -> dict:
    """Make one annotation of a cat, with a box that does not matter to the map."""
    fixed = {"id": number, "image_id": image_id, "category_id": 17, "bbox": [1.5, 2, 10, 20.25]}
    return {**fixed, "area": 70.5, "iscrowd": 0, "segmentation": segmentation, **more}


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def write_coco(root: Path, part: str, images: dict[int, list[dict]]) -> None:
    """Write photos and the annotations of one part, images in descending order of id."""
    entries = []
    for number in sorted(images, reverse=True):
        name = f"{number:012d}.jpg"
        save_image(root / part / name, seed=number)
        entries.append({"id": number, "file_name": name, "height": 24, "width": 32, "license": 1})
    content = {
        "images": entries,
        "annotations": [entry for entries in images.values() for entry in entries],
        "categories": [{"id": 17, "name": "cat"}, {"id": 90, "name": "toothbrush"}],
    }
    path = root / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def make_coco(root: Path) -> str:
    for part, first in (("train2017", 9), ("val2017", 139)):
        crowd = {"size": [24, 32], "counts": [0, 24 * 4, 24 * 28]}
        cats = [
            coco_annotation(1, first, [rectangle(10, 4, 14, 8)]),
            coco_annotation(2, first, [rectangle(8, 2, 20, 20), rectangle(24, 2, 30, 8)]),
            coco_annotation(3, first, crowd, iscrowd=1, category_id=90),
        ]
        write_coco(root, part, {first: cats, first + 1: []})
        for number in (first, first + 1):
            path = root / "stuffthingmaps" / part / f"{number:012d}.png"
            save_indices(path, index_map(number, 182))
    return f"coco:{root}"


def make_ade20k(root: Path) -> str:
    for folder, short in (("training", "train"), ("validation", "val")):
        for number in (1, 2):
            name = f"ADE_{short}_{number:08d}"
            save_image(root / "images" / folder / f"{name}.jpg", seed=number)
            classes = index_map(number, 151)
            classes[0] = 0
            save_indices(root / "annotations" / folder / f"{name}.png", classes)
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    lines += [f"{n} \t0.01\t99\t9\tthing {n}, object {n} " for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    scenes = ["ADE_train_00000001 airport_terminal", "ADE_train_00000002 bedroom"]
    (root / "sceneCategories.txt").write_text("\n".join(scenes) + "\n")
    return f"ade20k:{root}"


def make_cityscapes(root: Path) -> str:
    for split, city in (("train", "aachen"), ("val", "lindau"), ("test", "berlin")):
        for number in (0, 1):
            name = f"{split}/{city}/{city}_{number:06d}_000019"
            save_image(root / "leftImg8bit" / f"{name}_leftImg8bit.png", seed=number)
            ids = index_map(number, 34)
            ids[0] = 3
            is_thing = ids >= 24
            instances = np.where(is_thing, ids.astype(np.uint16) * 1000, ids).astype(np.uint16)
            save_indices(root / "gtFine" / f"{name}_gtFine_labelIds.png", ids)
            save_indices(root / "gtFine" / f"{name}_gtFine_instanceIds.png", instances)
    return f"cityscapes:{root}"


def write_bsds_mat(path: Path, segmentations: list[np.ndarray]) -> None:
    """Write one file of BSDS500: a cell an annotator, each a struct of two maps."""
    from scipy.io import savemat

    cells = np.empty((1, len(segmentations)), dtype=object)
    for number, regions in enumerate(segmentations):
        boundaries = (np.diff(regions.astype(int), axis=1, prepend=0) != 0).astype(np.uint8)
        cells[0, number] = {"Segmentation": regions, "Boundaries": boundaries}
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"groundTruth": cells})


def bsds_regions(seed: int) -> np.ndarray:
    return (index_map(seed, 6) % 6 + 1).astype(np.uint16)


def make_bsds(root: Path) -> str:
    for split in ("train", "val", "test"):
        for number in (100007, 2092):
            save_image(root / "images" / split / f"{number}.jpg", seed=number)
            regions = [bsds_regions(number + annotator) for annotator in range(3)]
            write_bsds_mat(root / "groundTruth" / split / f"{number}.mat", regions)
        (root / "images" / split / "Thumbs.db").write_bytes(b"as in the original")
    return f"bsds:{root}"


def nyu_h5(seed: int, hw: tuple[int, int] = (24, 32)) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Make the file of one image, and give its colours and its depth; a row has no depth."""
    random = np.random.default_rng(seed)
    rgb = random.integers(0, 255, (3, *hw), dtype=np.uint8)
    depth = random.uniform(0.7, 9.9, hw).astype(np.float32)
    depth[0] = 0
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        file["rgb"], file["depth"] = rgb, depth
    return sink.getvalue(), rgb, depth


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def make_nyu_hf(root: Path) -> str:
    for shard in (0, 1):
        scenes = {f"train/hall_000{n}a/0000{shard}.h5": nyu_h5(10 * shard + n)[0] for n in (1, 2)}
        write_tar(root / "data" / f"train-00000{shard}.tar", scenes)
    tests = {f"./val/official/0000{n}.h5": nyu_h5(20 + n)[0] for n in (1, 2)}
    write_tar(root / "data" / "val-000000.tar", tests | {"./val/readme.txt": b"no image"})
    return f"nyu_hf:{root}"


def make_rooms(_: Path) -> str:
    return "rooms:n=10,seed=3,size=48x64"


def make_creatures(_: Path) -> str:
    return "creatures:n=12,identities=5,kinds=2,seed=3,size=48x64"


def make_features(root: Path) -> str:
    tokens = np.random.default_rng(0).standard_normal((4, 7, 5)).astype(np.float32)
    np.save(root / "tokens.npy", tokens)
    lines = ["path,split,label", *(f"{n}.png,{'train' if n else 'test'},cat" for n in range(4))]
    (root / "tokens.csv").write_text("\n".join(lines) + "\n")
    return f"features:{root / 'tokens.npy'},tap=norm,grid=2x3"


MAKERS: dict[str, Callable[[Path], str]] = {
    "nyu.v1": make_nyu,
    "folder.v1": make_folder,
    "manifest.v1": make_manifest,
    "rooms.v1": make_rooms,
    "creatures.v1": make_creatures,
    "features.v1": make_features,
    "voc.v1": make_voc,
    "coco.v1": make_coco,
    "ade20k.v1": make_ade20k,
    "cityscapes.v1": make_cityscapes,
    "bsds.v1": make_bsds,
    "nyu_hf.v1": make_nyu_hf,
}


def write_nyu_mat(root: Path, n_images: int = 5) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a small file in the form of nyu_depth_v2_labeled.mat, and splits.mat beside it."""
    from scipy.io import savemat

    random = np.random.default_rng(0)
    arrays = {
        "images": random.integers(0, 255, (n_images, 3, 8, 6), dtype=np.uint8),
        "depths": random.uniform(1, 9, (n_images, 8, 6)).astype(np.float32),
    }
    arrays["rawDepths"] = arrays["depths"] * (random.random((n_images, 8, 6)) < 0.7)
    path = root / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        scenes = file.create_dataset("scenes", (1, n_images), dtype=h5py.ref_dtype)
        for number in range(n_images):
            text = f"kitchen_000{number // 2}"
            codes = np.frombuffer(text.encode("utf-16-le"), np.uint16)
            file[f"names/{number}"] = codes[:, None]
            scenes[0, number] = file[f"names/{number}"].ref
    train, test = np.array([[1], [2], [4]]), np.array([[3], [5]])
    savemat(root / "splits.mat", {"trainNdxs": train, "testNdxs": test})
    return path, arrays

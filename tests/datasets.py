"""Small data sets of every format, written to a folder: one maker a registered reader."""

from __future__ import annotations

import io
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


def make_rooms(_: Path) -> str:
    return "rooms:n=10,seed=3,size=48x64"


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
    "features.v1": make_features,
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

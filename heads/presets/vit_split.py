"""The experiments of ViT-Split (arXiv:2506.03433) on one cached view of each image.

Source: the paper, and the configurations of its release, as of HEADS.md 2.2 and 2.3. A value that
neither tells has a note that begins with "Inferred".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from featstore.catalogue import CATALOGUE
from featstore.layer_choice import last_layers, uniform_layers
from heads.presets.base import Needs, Preset

TITLE = "ViT-Split, Li et al., ICCV 2025, arXiv:2506.03433"
_POLY: Mapping[str, Any] = {"schedule": "poly", "warmup": 1500, "patience": 0}
_CLIP = 3.5  # see `_DEPTH_NOTES`
_ONE_VIEW = (
    "One cached view of each image: the release scales, crops, flips and recolours images at "
    "random, anew in each epoch, which stored features cannot follow. Expect less than its scores, "
    "and compare heads within one store."
)
_WHOLE = (
    "The whole image is drawn into the input and predicted at once; the release slides windows "
    "over an image of its own scale."
)
_OUTPUT = (
    "The loss is taken at the head's output, four cells a token and side; the release enlarges "
    "the output to the labels first."
)
_LAST = "Nothing is held out: the last weights are kept, as the release's script leaves them."
_DEPTH_NOTES = (
    (
        "Inferred: training sees the whole 480 x 640 image, padded to whole patches; the release "
        "crops 416 x 544 at random. Features of another size can be measured: heads evaluate "
        "--feature-set."
    ),
    (
        "The release multiplies the loss by 10 and clips gradients at 35: the plain loss is "
        "clipped at 3.5 here, which is the same to AdamW."
    ),
    "The release averages the predictions of an image and its mirror image; here it is one view.",
    "The paper prints 384K iterations; the configurations have 24 x 1,600.",
    "The paper has batches of 16; the release's script one GPU with 2 images, 4 for ViT-L.",
    "The release chooses weights on the test images, by absrel; here the last ones are kept.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    """One experiment on one size of DINOv2."""

    size: str
    kt: int
    kp: int
    layers: str = "uniform"
    b: int = 2
    lr: float
    parameters: int
    image_size: tuple[int, int] | None = None  # None: the experiment's
    loop: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Experiment:
    """What all sizes of an experiment have in common."""

    base: str
    task: str = "segmentation"
    data: tuple[str, ...]
    resize: str = "letterbox"
    image_size: tuple[int, int]
    steps: int
    train_data: str
    train_images: int | None
    test_data: str
    task_options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...]
    sizes: tuple[_Size, ...]


_EXPERIMENTS = (
    _Experiment(
        base="vit-split-ade20k",
        data=("ade20k",),
        image_size=(518, 518),
        steps=40_000,
        train_data="ADE20K training, one view",
        train_images=20_210,
        test_data="ADE20K validation, 2,000 images",
        task_options={"classes": 150},
        notes=(
            _ONE_VIEW,
            _WHOLE,
            _OUTPUT,
            "Inferred: the image is fitted into 518 x 518, in which the release centres 512 x 512.",
            _LAST,
        ),
        sizes=(
            _Size(size="s", kt=3, kp=4, lr=3e-4, parameters=10_231_098),
            _Size(size="b", kt=3, kp=4, lr=2e-4, parameters=40_516_026),
            _Size(size="l", kt=4, kp=8, lr=2e-4, parameters=88_639_674),
            _Size(
                size="g",
                kt=8,
                kp=14,
                b=27,
                lr=2e-4,
                parameters=326_530_234,
                image_size=(896, 896),
                notes=(
                    (
                        "The rule gives block 27 twice, and the release reads it twice. The taps "
                        "of one image take 164 MB. The paper trains for 50k iterations."
                    ),
                ),
            ),
        ),
    ),
    _Experiment(
        base="vit-split-cityscapes",
        data=("cityscapes",),
        resize="squash",
        image_size=(448, 896),
        steps=40_000,
        train_data="Cityscapes train, fine annotations, one view",
        train_images=2975,
        test_data="Cityscapes val, 500 images",
        task_options={"classes": 19},
        notes=(
            _ONE_VIEW,
            _WHOLE,
            _OUTPUT,
            (
                "Inferred: the image at 448 x 896, which keeps its shape; the release reads "
                "windows of 896 x 896 at full scale."
            ),
            "The README says 40k iterations, the configurations 20k.",
            _LAST,
        ),
        sizes=(
            _Size(size="b", kt=5, kp=5, layers="last", lr=2e-4, parameters=55_183_927),
            _Size(size="l", kt=10, kp=8, lr=1e-4, parameters=164_095_031),
        ),
    ),
    _Experiment(
        base="vit-split-pascal-context",
        data=("voc",),
        image_size=(490, 490),
        steps=20_000,
        train_data="Pascal Context train, 59 classes, one view",
        train_images=None,
        test_data="Pascal Context val",
        task_options={"classes": 59},
        notes=(
            (
                "There is no reader of Pascal Context's own files. Give the layout of VOC, "
                "voc:PATH,classes=FILE, with index images of the 59 classes from 0, 255 elsewhere."
            ),
            _ONE_VIEW,
            _WHOLE,
            _OUTPUT,
            "Inferred: the image is fitted into 490 x 490, in which the release centres 480 x 480.",
            _LAST,
        ),
        sizes=(
            _Size(size="b", kt=4, kp=4, layers="last", lr=1e-4, parameters=47_535_455),
            _Size(
                size="l",
                kt=6,
                kp=10,
                layers="last",
                lr=1e-4,
                parameters=115_840_095,
                notes=(
                    (
                        "The README has 164.1 million parameters, which are those of Cityscapes; "
                        "the configuration gives 115.8."
                    ),
                ),
            ),
        ),
    ),
    _Experiment(
        base="vit-split-nyu",
        task="depth",
        data=("nyu_hf", "nyu"),
        resize="pad",
        image_size=(490, 644),
        steps=38_400,
        train_data="NYU Depth v2, about 24,000 frames of the training scenes, one view",
        train_images=24_231,
        test_data="NYU Depth v2, 654 images, Eigen's crop",
        data_options={"crop": "eigen"},
        notes=(_ONE_VIEW, *_DEPTH_NOTES, _OUTPUT),
        sizes=(
            _Size(
                size="s",
                kt=3,
                kp=4,
                lr=5e-4,
                parameters=9_336_165,
                loop={"schedule": "poly", "warmup": 3200, "clip": _CLIP, "patience": 0},
                notes=("The paper has 3e-4 and one cycle; the configuration 5e-4 and poly.",),
            ),
            _Size(
                size="b",
                kt=4,
                kp=4,
                lr=3e-4,
                parameters=44_045_349,
                loop={"schedule": "onecycle", "clip": _CLIP, "patience": 0},
                notes=(
                    (
                        "The README has 37.0 million parameters, which are those of Kt = 3; the "
                        "configuration has Kt = 4."
                    ),
                ),
            ),
            _Size(
                size="l",
                kt=3,
                kp=4,
                b=6,
                lr=3e-4,
                parameters=65_527_205,
                loop={"schedule": "onecycle", "clip": _CLIP, "patience": 0},
                notes=(
                    (
                        "Blocks 6, 11, 17 and 23 by the code's floor; the paper's rounding "
                        "(rounding=nearest) gives 6, 12, 17 and 23."
                    ),
                ),
            ),
        ),
    ),
)


def presets() -> Iterator[Preset]:
    """Give every experiment on every size, the smallest first."""
    for one in _EXPERIMENTS:
        for size in one.sizes:
            yield _preset(one, size)


def _preset(one: _Experiment, size: _Size) -> Preset:
    backbone = f"dinov2_{size.size}"
    chosen: dict[str, Any] = {"layers": size.layers, "kp": size.kp, "kt": size.kt}
    if size.layers == "uniform":
        chosen["b"] = size.b
    return Preset(
        base=one.base,
        variant=size.size,
        paper=TITLE,
        task=one.task,
        head="vit_split",
        steps=one.steps,
        batch_size=16,
        lr=size.lr,
        weight_decay=0.01,
        val_fraction=0.0,
        head_options=chosen,
        task_options=one.task_options,
        data_options=one.data_options,
        loop_options=size.loop or _POLY,
        needs=Needs(
            backbone=backbone,
            image_size=size.image_size or one.image_size,
            resize=one.resize,
            taps=_taps(CATALOGUE[backbone].depth, size),
            tail=size.kt,
        ),
        data=one.data,
        train_data=one.train_data,
        train_images=one.train_images,
        test_data=one.test_data,
        parameters=size.parameters,
        notes=(*size.notes, *one.notes),
    )


def _taps(depth: int, size: _Size) -> tuple[str, ...]:
    """Name what the prior reads, and the block before the copied ones."""
    if size.layers == "last":
        blocks = last_layers(depth, size.kp)
    else:
        blocks = uniform_layers(depth, size.kp, size.b)
    return tuple(f"block:{number}" for number in sorted({*blocks, depth - size.kt - 1}))

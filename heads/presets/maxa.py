"""The experiments of MAXA (ICLR 2025 submission zV6D212c7Q), the predecessor of DeAP.

It has no code of its own; the release of DeAP has its layers. Source: the paper, A.1 and A.6, and
HEADS.md 1.2 to 1.5. A value that neither tells has a note that begins with "Inferred".
"""

from __future__ import annotations

from collections.abc import Iterator

from heads.presets.base import (
    MASK_NOTE,
    Experiment,
    Preset,
    paper_reading,
    preset_of,
    release_reading,
)
from heads.presets.deap import (
    COCO_TEST,
    INSTANCE_NOTES,
    NO_LENGTH,
    NYU_NOTES,
    VOC_NOTES,
)

TITLE = "MAXA, ICLR 2025 submission zV6D212c7Q"
_COCO = "COCO train2017"


EXPERIMENTS = (
    Experiment(
        base="maxa-voc",
        task="segmentation",
        data=("voc",),
        framing="squash",
        steps=3000,
        release_queries=56,
        train_data="PASCAL VOC 2012 train",
        train_images=1464,
        test_data="PASCAL VOC 2012 val, 1,449 images",
        parameters=208_892,
        task_options={"classes": 21},
        notes=VOC_NOTES,
    ),
    Experiment(
        base="maxa-depth",
        task="depth",
        data=("nyu_hf", "nyu"),
        framing="squash",
        steps=3000,
        train_data="NYU Depth v2",
        train_images=None,
        test_data="NYU Depth v2, 654 images",
        parameters=193_050,
        paper_lr=2e-3,
        data_options={"crop": "eigen"},
        notes=(
            *NYU_NOTES[:1],
            (
                "The depth column of this paper is an MSE in units of its own; do not compare it "
                "with the RMSE in metres that is measured here."
            ),
            "Inferred: Eigen's crop, and which of the copies of NYU Depth v2.",
        ),
    ),
    Experiment(
        base="maxa-coco-stuff",
        task="segmentation",
        data=("coco",),
        framing="crop",
        steps=20_000,
        train_data="COCO-Stuff, 100,000 images",
        train_images=100_000,
        test_data="COCO-Stuff val2017, 5,000 images",
        parameters=345_888,
        val_fraction=0.155,
        dc=64,
        task_options={"classes": 200},
        notes=(
            "Inferred: 200 outputs; the paper does not say so, and only 200 gives its parameters.",
        ),
    ),
    Experiment(
        base="maxa-boundaries",
        task="boundaries",
        data=("coco",),
        framing="crop",
        steps=10_000,
        release_queries=56,
        train_data=_COCO,
        train_images=None,
        test_data=COCO_TEST,
        parameters=193_050,
        paper_lr=2e-3,
    ),
    Experiment(
        base="maxa-instances",
        task="instances",
        data=("coco",),
        framing="crop",
        steps=20_000,
        train_data=f"{_COCO}, 8,000 images",
        train_images=8000,
        test_data="COCO val2017, 754 images with at least three large objects",
        parameters=229_968,
        task_options={"embedding": 32, "restarts": 15},
        notes=INSTANCE_NOTES,
    ),
    Experiment(
        base="maxa-distance",
        task="distance",
        data=("coco",),
        framing="crop",
        steps=10_000,
        release_queries=None,
        train_data=_COCO,
        train_images=None,
        test_data=COCO_TEST,
        parameters=193_050,
        notes=(
            NO_LENGTH.format(steps=10_000) + " Those of boundaries are taken.",
            "Inferred: 1 at an instance's innermost pixel; the paper says normalised distances.",
        ),
    ),
)


def presets() -> Iterator[Preset]:
    """Give every experiment in the paper's reading, and where there is one in the release's."""
    for one in EXPERIMENTS:
        yield _paper(one)
        if one.release_queries is not None:
            yield _release(one)


def _paper(one: Experiment) -> Preset:
    notes = (
        MASK_NOTE + " The paper's own numbers may well come from the form of the release "
        "(inferred): try --set mask_form=code.",
        "Adam at 1e-3, and 2e-3 for boundaries and depth (A.1). Inferred: no weight decay.",
        (
            "Inferred: steps, batch size and number of images, where the paper does not tell "
            "them; they are those of DeAP's release, if it has the experiment."
        ),
        (
            "Inferred: DeAP's checkpoint; the paper says DINOv2 ViT-B at 518 pixels, and not "
            "whether it has registers. Images get there in one step, cut to a square where they "
            "are COCO's."
        ),
    )
    reading = paper_reading(one, basis="", notes=notes)
    return preset_of(one, reading, paper=TITLE, head="maxa")


def _release(one: Experiment) -> Preset:
    assert one.release_queries is not None
    notes = (
        (
            "Inferred: that MAXA's head is trained as DeAP's release trains its own: AdamW, 1e-3 "
            "everywhere, a weight decay of 0.01, 224 pixels enlarged by the nearest neighbour, "
            f"{one.release_queries} queries a side. The paper says Adam, 2e-3 for boundaries and "
            "depth, and outputs of 224 a side."
        ),
    )
    reading = release_reading(one, notes)
    return preset_of(one, reading, paper=TITLE, head="maxa")

"""The experiments of Dense Attentive Probing (Lueddecke & Ecker, TMLR 2025).

Source: the paper, and the configurations of its release, as of HEADS.md 1.2, 1.3 and 1.5. A value
that neither tells has a note that begins with "Inferred".
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

TITLE = "Dense Attentive Probing, Lueddecke & Ecker, TMLR 2025"
COCO_INSTANCES = "COCO train2017, resized and cut to a square"
COCO_TEST = "COCO val2017, 5,000 images"
NO_LENGTH = "Inferred: {steps:,} steps; neither paper nor release tells them."
VOC_NOTES = (
    NO_LENGTH.format(steps=3000) + " The release's default of 60 looks like a leftover; the paper "
    "says less than 16 minutes on an RTX 2080.",
    (
        "The paper tests on VOC's val and chooses weights on a part of train; so does this: data "
        "of format voc has VOC's val as its split test."
    ),
    "The release measures 500 images of val at most, and maps resized to 224: compare miou@224.",
)
NYU_NOTES = (
    (
        "The release holds out every 10th image of 42,000 to 47,000 and learns from those before; "
        "here whole scenes, a tenth of train, are held out."
    ),
    (
        "The paper first scales images to 216 x 288; a basis has one side here, so that 224 x 224 "
        "of the squashed image stand for it in both readings (inferred)."
    ),
    (
        "Table 4's caption calls the error of depth MSE; the release measures the RMSE in metres, "
        "in Eigen's crop of 480 x 640, which crop=eigen measures."
    ),
)
INSTANCE_NOTES = (
    "The vectors of the ~60,000 training instances are part of the loss and not counted.",
    (
        "Inferred: 256 pixels of each image a step (pixels=256); the release takes all, or a "
        "number that is not known."
    ),
    (
        "The paper clusters the foreground (ari_fg@large here), the release all pixels "
        "(ari_all@large)."
    ),
)
EXPERIMENTS = (
    Experiment(
        base="deap-voc",
        task="segmentation",
        data=("voc",),
        framing="squash",
        steps=3000,
        release_queries=56,
        train_data="PASCAL VOC 2012 train, squashed",
        train_images=1464,
        test_data="PASCAL VOC 2012 val, 1,449 images",
        parameters=47_272,
        task_options={"classes": 21},
        notes=VOC_NOTES,
        paper_notes=(
            (
                "The text's rule for the CNN, max(D/4, outputs), would give 59.4k parameters; the "
                "paper's own table has 47k, which is the release's max(D//4, outputs//2)."
            ),
        ),
    ),
    Experiment(
        base="deap-nyu",
        task="depth",
        data=("nyu_hf",),
        framing="squash",
        steps=3000,
        train_data="NYU Depth v2 as sayakpaul/nyu_depth_v2, train 0 to 42,000, squashed",
        train_images=42_000,
        test_data="NYU Depth v2, 654 images, Eigen's crop",
        parameters=43_286,
        paper_lr=2e-3,
        data_options={"crop": "eigen"},
        notes=NYU_NOTES,
    ),
    Experiment(
        base="deap-coco-stuff",
        task="segmentation",
        data=("coco",),
        framing="crop",
        steps=20_000,
        train_data="COCO-Stuff, train2017[:100000], resized and cut to a square",
        train_images=100_000,
        test_data="COCO-Stuff val2017, 5,000 images",
        parameters=87_704,
        val_fraction=0.155,
        dc=32,
        task_options={"classes": 200},
        notes=(
            (
                "The release has 200 outputs for the raw label ids; the paper does not say, and "
                "only 200 gives the parameters of the tables."
            ),
            "The release holds out the last 18,287 images of train2017; here as many by chance.",
        ),
    ),
    Experiment(
        base="deap-boundaries",
        task="boundaries",
        data=("coco",),
        framing="crop",
        steps=10_000,
        release_queries=56,
        train_data=f"{COCO_INSTANCES} of 448",
        train_images=5000,
        test_data=COCO_TEST,
        parameters=43_286,
        paper_lr=2e-3,
        notes=(
            (
                "The release learns from 5,000 images; the paper does not tell how many. Extract a "
                "store of as many: this preset learns from all that the store has."
            ),
            "Inferred: the backbone gets the 224 image enlarged, as in the other experiments.",
        ),
    ),
    Experiment(
        base="deap-detection",
        task="detection",
        data=("coco",),
        framing="crop",
        steps=20_000,
        release_queries=56,
        train_data=f"{COCO_INSTANCES} of 448",
        train_images=None,
        test_data=COCO_TEST,
        parameters=86_594,
        task_options={"min_score": 0.01, "max_overlap": 0.5},
        notes=(
            "The tables' metric is the average precision of large objects, ap_lg@448 here.",
            "Inferred: centres begin at a probability of 0.1 (centre_bias=-2.19), as CenterNet's.",
        ),
    ),
    Experiment(
        base="deap-instances",
        task="instances",
        data=("coco",),
        framing="crop",
        steps=20_000,
        train_data="COCO train2017, 8,000 images",
        train_images=8000,
        test_data="COCO val2017, 754 images with at least three large objects",
        parameters=53_352,
        task_options={"embedding": 32, "restarts": 15},
        notes=(
            NO_LENGTH.format(steps=20_000) + " Those of detection and COCO-Stuff are taken.",
            "Inferred: 28 x 28 queries and a square cut; the release's are not known here.",
            *INSTANCE_NOTES,
        ),
        paper_notes=(
            (
                "The text's rule for the CNN, max(D/4, outputs), would give 79.3k parameters; the "
                "paper's own table has 53k, which is the release's max(D//4, outputs//2)."
            ),
        ),
    ),
)


def presets() -> Iterator[Preset]:
    """Give every experiment in both readings, the default one first."""
    for one in EXPERIMENTS:
        yield _release(one)
        yield _paper(one)


def _release(one: Experiment) -> Preset:
    assert one.release_queries is not None
    notes = (
        (
            "The release trains with AdamW, 1e-3 everywhere; the text of MAXA, its predecessor, "
            "says Adam, and 2e-3 for boundaries and depth."
        ),
        (
            "The paper's outputs are 224 a side for all tasks; the release asks "
            f"{one.release_queries} queries a side here, for {8 * one.release_queries}."
        ),
        (
            "The release enlarges the 224 image by torch's nearest neighbour, and by an "
            "antialiased bicubic filter where it computes features ahead; nearest is taken. "
            "Pillow's nearest takes the pixel under a cell's centre, torch's that under its "
            "corner: a shift of half an input pixel."
        ),
    )
    reading = release_reading(one, notes)
    return preset_of(one, reading, paper=TITLE, head="deap")


def _paper(one: Experiment) -> Preset:
    notes = (
        MASK_NOTE,
        (
            "The text projects tokens to D before keys and values; the paper's own tables count a "
            "head without that step, which is the one built."
        ),
        (
            "Inferred: the optimiser is MAXA's (Adam, without weight decay); this text names "
            "none. The release trains with AdamW, 1e-3 and a weight decay of 0.01."
        ),
        "Inferred: steps and batch size, which only the release tells.",
        (
            "Inferred: the basis of 224 pixels is enlarged by the backbone's own interpolation; "
            "the paper does not say how. The release takes the nearest neighbour."
        ),
    )
    reading = paper_reading(one, basis="via:224", notes=(*one.paper_notes, *notes))
    return preset_of(one, reading, paper=TITLE, head="deap")

"""What a preset is: what a published result was made with, and what is not known of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from featstore.errors import invalid
from featstore.plan import DTYPES, check_resize, parse_resize

PAPER, RELEASE = "paper", "release"
SIZES = ("s", "b", "l", "g")
"""Variants of an experiment that was made with backbones of several sizes."""

MASK_NOTE = (
    "The paper's mask is exp(-d^2/2s^2)/(s sqrt 2pi) of the distance d; the release squares a d "
    "that is squared already. mask_form names which."
)
INFERRED_LOOP = (
    "Inferred: a constant learning rate and no early stop (patience=0); the weights with the "
    "lowest loss on the held-out part are kept."
)
PRECISION_NOTE = (
    "The release trains in mixed precision; here all of the head is float32, and features are "
    "stored as float16."
)
BACKBONE, IMAGE_SIZE = "dinov2_b_reg", 518  # of the release; its weights take 37 x 37 patches


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """The features that a preset learns from, as `featstore extract` takes them."""

    backbone: str  # of the catalogue
    image_size: tuple[int, int]  # height, width of the backbone's input in pixels
    resize: str  # see `featstore.plan.parse_resize`
    taps: tuple[str, ...]
    dtype: str = "float16"
    tail: int | None = None  # last blocks whose weights are stored too

    def __post_init__(self) -> None:
        check_resize(self.resize)
        if self.dtype not in DTYPES:
            raise invalid("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if not self.taps or min(self.image_size) < 1:
            expected = "at least one tap and a positive number of pixels"
            raise invalid("taps, image_size", (self.taps, self.image_size), expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One experiment of a paper, in one reading of it.

    `variant` says which: what the paper's text says, or what its released code does; or, of an
    experiment that was made with several sizes of a backbone, the size. `notes` name each place
    where the two disagree, and each value that neither tells: those begin with "Inferred".
    """

    base: str  # such as "deap-voc"
    variant: str  # PAPER or RELEASE
    paper: str
    task: str
    head: str
    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    split: str = "train"
    val_fraction: float = 0.1  # of the split, held out to choose the weights
    head_options: Mapping[str, Any] = field(default_factory=dict)
    task_options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)  # of the task, on its data only
    loop_options: Mapping[str, Any] = field(default_factory=dict)
    needs: Needs
    data: tuple[str, ...]  # formats of the data it was made with
    train_data: str
    train_images: int | None  # learned from, without those held out; None: not known
    test_data: str
    parameters: int  # of the head on the features it needs, as the paper counts them
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.variant not in (PAPER, RELEASE, *SIZES):
            raise invalid("variant", self.variant, f"one of {', '.join((PAPER, RELEASE, *SIZES))}")

    @property
    def name(self) -> str:
        """Full name, such as "deap-voc@release"."""
        return f"{self.base}@{self.variant}"

    def to_json(self) -> dict[str, Any]:
        """Give JSON values, the full name first."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What all readings of an experiment have in common, from which `preset_of` makes them."""

    base: str
    task: str
    data: tuple[str, ...]
    framing: str  # "squash" or "crop"
    steps: int
    train_data: str
    train_images: int | None
    test_data: str
    parameters: int
    paper_lr: float = 1e-3
    release_queries: int | None = 28  # None: the release does not have it
    val_fraction: float = 0.1
    dc: int | None = None  # channels of the CNN; None: the head's rule
    task_options: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    paper_notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one reading adds: of the paper's text, or of the release."""

    variant: str
    lr: float
    weight_decay: float
    queries: int
    mask_form: str
    basis: str  # of the resize rule, such as "via:224:nearest"; "": none
    notes: tuple[str, ...]


def release_reading(one: Experiment, notes: tuple[str, ...]) -> Reading:
    """Read an experiment as DeAP's release trains all of its own."""
    assert one.release_queries is not None
    return Reading(
        variant=RELEASE,
        lr=1e-3,
        weight_decay=0.01,
        queries=one.release_queries,
        mask_form="code",
        basis="via:224:nearest",
        notes=(MASK_NOTE, *notes, PRECISION_NOTE, INFERRED_LOOP),
    )


def paper_reading(one: Experiment, *, basis: str, notes: tuple[str, ...]) -> Reading:
    """Read an experiment as the texts of both papers have it, MAXA's optimiser included."""
    return Reading(
        variant=PAPER,
        lr=one.paper_lr,
        weight_decay=0.0,
        queries=28,
        mask_form="paper",
        basis=basis,
        notes=(*notes, INFERRED_LOOP),
    )


def preset_of(one: Experiment, reading: Reading, *, paper: str, head: str) -> Preset:
    """Make a preset of an experiment in one reading."""
    rule = f"{one.framing}+{reading.basis}" if reading.basis else one.framing
    dc = {} if one.dc is None else {"dc": one.dc}
    return Preset(
        base=one.base,
        variant=reading.variant,
        paper=paper,
        task=one.task,
        head=head,
        steps=one.steps,
        batch_size=32,
        lr=reading.lr,
        weight_decay=reading.weight_decay,
        val_fraction=one.val_fraction,
        head_options={"mask_form": reading.mask_form, "queries": reading.queries, **dc},
        task_options=one.task_options,
        data_options=one.data_options,
        loop_options={"schedule": "constant", "patience": 0},
        needs=Needs(
            backbone=BACKBONE,
            image_size=(IMAGE_SIZE, IMAGE_SIZE),
            resize=str(parse_resize(rule)),
            taps=("norm",),
        ),
        data=one.data,
        train_data=one.train_data,
        train_images=one.train_images,
        test_data=one.test_data,
        parameters=one.parameters,
        notes=(*one.notes, *reading.notes),
    )

"""The plan (what decides the stored numbers, hashed) and the options of a run (what does not)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from featstore.errors import invalid
from featstore.hashing import short_key
from featstore.views import parse_views

FORMAT_VERSION = 1
DTYPES = ("float16", "float32", "bfloat16")
RESIZES = ("squash", "letterbox", "crop", "pad")
UPSCALES = ("nearest", "bilinear", "bicubic")
_RULE = re.compile(
    rf"(?P<kind>{'|'.join(RESIZES)})"
    r"|(?:(?P<framing>squash|letterbox|crop)\+)?via:(?P<via>[1-9][0-9]*)"
    rf"(?::(?P<upscale>{'|'.join(UPSCALES)}))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractPlan:
    """Every choice that decides the stored numbers, and no other.

    Equal plans have equal keys on every machine, so a finished extraction is never repeated.
    Taps, views, data sets, batch size, device and paths are not here: they may be added or
    changed later without redoing what is stored.
    """

    architecture: str  # timm's name without the tag
    tag: str  # timm's pretrained tag, "file" or "random:SEED"
    weights_sha256: str  # of the whole loaded state dict, before any block is dropped
    image_size: tuple[int, int]  # height, width of the backbone's input in pixels
    resize: str  # "squash", "letterbox", "crop", "pad" or with a basis, see `parse_resize`
    interpolation: str  # of images: "bicubic", "bilinear", ...
    mean: tuple[float, ...]  # of RGB in [0, 1]
    std: tuple[float, ...]
    position_grid: str  # how position embeddings were resampled, or "none"
    precision: str = "float32"  # of the forward pass; TF32 is off
    dtype: str = "float16"  # of the stored numbers
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise invalid("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        # Two ways to write one rule must not give two keys.
        rule = parse_resize(self.resize)
        if rule.upscale == self.interpolation:
            rule = replace(rule, upscale=None)
        object.__setattr__(self, "resize", str(rule))
        if min(self.image_size) < 1:
            raise invalid("image_size", self.image_size, "positive numbers of pixels")

    def key(self) -> str:
        """Name of the feature set: 16 hex digits (64 bits) of the SHA-256 of the fields."""
        return short_key(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Give the fields as JSON values; `from_json` inverts it."""
        plain = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExtractPlan:
        """Rebuild a plan from `to_json`'s value, unknown fields being an error."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise invalid(
                "plan", unknown, "made of the fields of format 1", hint="Update featstore."
            )
        fixed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return cls(**fixed)

    def differences(self, other: ExtractPlan) -> dict[str, tuple[Any, Any]]:
        """List the fields that differ as name -> (own value, other's value)."""
        mine, theirs = self.to_json(), other.to_json()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resize:
    """How an image becomes the input: `parse_resize` reads it, ``str`` writes it.

    With a basis, `via` pixels a side, the region is first drawn on a square of that size by the
    plan's interpolation, and this is then resized to the input by `upscale` (None: the plan's
    interpolation).
    """

    kind: str  # one of RESIZES
    via: int | None = None  # None: in one step
    upscale: str | None = None  # one of UPSCALES

    def __str__(self) -> str:
        if self.via is None:
            return self.kind
        framing = "" if self.kind == "squash" else f"{self.kind}+"
        return f"{framing}via:{self.via}" + (f":{self.upscale}" if self.upscale else "")


def parse_resize(resize: str) -> Resize:
    """Read a resize rule: a kind, or ``[squash+|crop+|letterbox+]via:N[:FILTER]``.

    Raises:
        InvalidInputError: It is no such rule.
    """
    match = _RULE.fullmatch(resize)
    if match is None:
        raise invalid(
            "resize",
            resize,
            f"{', '.join(RESIZES)} or [squash+|crop+|letterbox+]via:N[:{'|'.join(UPSCALES)}] "
            "(N pixels)",
        )
    if match["kind"]:
        return Resize(kind=match["kind"])
    return Resize(
        kind=match["framing"] or "squash", via=int(match["via"]), upscale=match["upscale"]
    )


def check_resize(resize: str) -> None:
    """Check a resize rule.

    Raises:
        InvalidInputError: It is none that `parse_resize` reads.
    """
    parse_resize(resize)


def compose_resize(resize: str, *, basis: int | None, upscale: str | None) -> str:
    """Add a basis, and the filter that enlarges it, to a rule.

    Args:
        resize: A rule; with `basis` one that has none itself.
        basis: Pixels a side; None leaves the rule as it is.
        upscale: One of `UPSCALES`; None: the plan's interpolation.

    Raises:
        InvalidInputError: The rule takes no basis or has one, or there is a filter without basis.
    """
    rule = parse_resize(resize)
    if basis is None:
        if upscale is not None:
            raise invalid("upscale", upscale, "given with a basis", hint="Try --basis 224.")
        return resize
    if rule.via is not None or rule.kind == "pad":
        hint = "Give the basis once."
        raise invalid(
            "resize", resize, "squash, crop or letterbox where a basis is given", hint=hint
        )
    composed = str(Resize(kind=rule.kind, via=basis, upscale=upscale))
    check_resize(composed)
    return composed


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What decides the speed of an extraction or which images it covers, but no stored number."""

    splits: tuple[str, ...] = ()  # empty: all
    views: tuple[str, ...] = ()  # beside the plain one, see `views.parse_views`
    device: str = "auto"
    batch_size: int | None = None  # None: chosen for the device
    limit: int | None = None  # images, after selection by split
    seed: int = 0  # of the order of rows within an assignment
    n_threads: int | None = None  # for decoding; None: as many as cores
    on_bad_image: str = "skip"
    targets: bool = True  # store labels and thumbnails
    latency: bool = False  # time the backbone afterwards, for `heads figure speed`
    workers: int | None = None  # processes of a local cluster; None: this process alone
    scheduler: str | None = None  # address of a Dask scheduler, instead of `workers`
    shard_range: tuple[int, int] | None = None  # (i, n): the i-th of n parts, from 1; None: all

    def __post_init__(self) -> None:
        if self.on_bad_image not in ("skip", "fail"):
            raise invalid("on_bad_image", self.on_bad_image, "skip or fail")
        for name in ("batch_size", "limit", "n_threads", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise invalid(name, value, "at least 1")
        if self.workers is not None and self.scheduler is not None:
            hint = "The scheduler's workers are those that it has."
            raise invalid("workers", self.workers, "left out with a scheduler", hint=hint)
        if self.shard_range is not None:
            part, n_parts = self.shard_range
            if not 1 <= part <= n_parts:
                value = f"{part}/{n_parts}"
                raise invalid("shard_range", value, "i/n with i from 1 to n", hint="Try 1/4.")
        object.__setattr__(self, "views", parse_views(self.views))

    def has_shard(self, shard: int) -> bool:
        """Tell whether a shard is in the part to do; the parts of n runs make the whole.

        A shard's part depends on its number alone: runs that begin at different times agree.
        """
        if self.shard_range is None:
            return True
        part, n_parts = self.shard_range
        return shard % n_parts == part - 1

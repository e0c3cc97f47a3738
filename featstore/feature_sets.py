"""Making feature sets, adding taps to them, and telling several of them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from featstore.arrays import ensure_array
from featstore.errors import FormatError, InvalidInputError, NotFoundError, not_found
from featstore.files import write_bytes
from featstore.hashing import canonical_json
from featstore.lines import n_assigned_rows
from featstore.plan import ExtractPlan
from featstore.store import FeatureSetFolder, StoreFolder, write_attributes
from featstore.tail import TailWeights
from featstore.tail_file import write_tail
from featstore.types import TapShape

NORM_FILE = "norm.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalNorm:
    """The backbone's final norm, which heads apply to raw block outputs."""

    kind: str  # "layer_norm" or "rms_norm"
    eps: float
    weight: np.ndarray  # (dim,) float32
    bias: np.ndarray | None  # (dim,) float32


@dataclass(frozen=True, kw_only=True, slots=True)
class NewFeatureSet:
    """What is recorded of a feature set when it is made."""

    key: str
    name: str
    dtype: str
    shard_rows: int
    plan: ExtractPlan | None  # None: the features were imported
    backbone: Mapping[str, Any]
    provenance: Mapping[str, Any]
    final_norm: FinalNorm | None
    tail: TailWeights | None = None


def ensure_feature_set(
    store: StoreFolder, new: NewFeatureSet, shapes: Sequence[TapShape]
) -> FeatureSetFolder:
    """Make the feature set if it is not there, and add those of the taps that it lacks.

    Call it under the feature set's writer lock.

    Raises:
        FormatError: A tap is stored with another shape.
    """
    path = store.path / "feature_sets" / new.key
    if new.final_norm is not None and not (path / NORM_FILE).exists():
        write_bytes(path / NORM_FILE, _norm_bytes(new.final_norm))
    if not (path / "zarr.json").exists():
        _make(path, new)
    add_taps(FeatureSetFolder(path), shapes)
    if new.tail is not None:
        write_tail(FeatureSetFolder(path), new.tail)
    return FeatureSetFolder(path)


def _make(path: Path, new: NewFeatureSet) -> None:
    attributes = {
        "name": new.name,
        "dtype": new.dtype,
        "shard_rows": new.shard_rows,
        "plan": None if new.plan is None else new.plan.to_json(),
        "backbone": dict(new.backbone),
        "provenance": dict(new.provenance),
        "taps": {},
    }
    if new.final_norm is not None:
        attributes["norm_sha256"] = hashlib.sha256(_norm_bytes(new.final_norm)).hexdigest()
    write_attributes(path, attributes)


def add_taps(folder: FeatureSetFolder, shapes: Sequence[TapShape]) -> None:
    """Record those of the taps that the feature set lacks; call it under its writer lock.

    Raises:
        FormatError: A tap is stored with another shape.
    """
    known = folder.taps
    for shape in shapes:
        if shape.tap in known and known[shape.tap] != shape:
            raise FormatError(
                f"{shape.tap} is stored as {known[shape.tap]} and this run gives {shape}. "
                "Extract into a new store."
            )
    taps = {**known, **{shape.tap: shape for shape in shapes}}
    if set(taps) == set(known):
        return
    recorded = {
        tap: {
            "dim": s.dim,
            "grid": None if s.grid is None else list(s.grid),
            "n_prefix": s.n_prefix,
        }
        for tap, s in sorted(taps.items())
    }
    write_attributes(folder.path, {**folder.attributes, "taps": recorded})


def grow_arrays(folder: FeatureSetFolder, taps: Sequence[str]) -> None:
    """Make or grow the arrays of `taps` so that they cover every assigned row."""
    covered = folder.layout.next_free_row(n_assigned_rows(folder))
    for tap in taps:
        shape = folder.taps[tap]
        for array in shape.arrays:
            ensure_array(folder, shape, array, n_rows=covered)


def _norm_bytes(norm: FinalNorm) -> bytes:
    tensors = {"weight": norm.weight.astype(np.float32)}
    if norm.bias is not None:
        tensors["bias"] = norm.bias.astype(np.float32)
    # One entry: safetensors writes several in an order that changes from process to process.
    metadata = {"norm": canonical_json({"kind": norm.kind, "eps": norm.eps})}
    data: bytes = safetensors.numpy.save(tensors, metadata)
    return data


def read_final_norm(folder: FeatureSetFolder) -> FinalNorm | None:
    """Read the final norm stored with a feature set, or None where its backbone has none.

    Raises:
        FormatError: The file is damaged, or missing where its checksum is recorded.
    """
    path = folder.path / NORM_FILE
    recorded = folder.attributes.get("norm_sha256")
    if recorded is None and not path.exists():
        return None
    try:
        data = path.read_bytes()
        if recorded not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError("its checksum is another")
        with safetensors.safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["norm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return FinalNorm(
            kind=about["kind"],
            eps=about["eps"],
            weight=tensors["weight"],
            bias=tensors.get("bias"),
        )
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path} is damaged. Delete it and run the extraction again to write it anew."
        ) from error


def find_feature_set(
    store: StoreFolder,
    key: str | None = None,
    *,
    name: str | None = None,
    backbone: str | None = None,
) -> FeatureSetFolder:
    """Choose one feature set by key, unique prefix of a key, name or backbone.

    Args:
        store: Store.
        key: Key, prefix of one, or name.
        name: Name.
        backbone: Name of the backbone as it was extracted.

    Raises:
        NotFoundError: None fits.
        InvalidInputError: Several fit; the message tells them apart field by field.
    """
    everything = [store.feature_set(one) for one in store.feature_set_keys()]
    if not everything:
        raise NotFoundError(
            f"{store.path} has no feature set yet. Make one with `featstore extract`."
        )
    fitting = [one for one in everything if _fits(one, key, name, backbone)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InvalidInputError(_ambiguous(fitting))
    if backbone is not None and key is None and name is None:
        raise not_found("backbone in this store", backbone, {_alias(one) for one in everything})
    known = [one.key for one in everything] + [one.attributes["name"] for one in everything]
    raise not_found("feature set", str(key or name or backbone), known)


def _alias(folder: FeatureSetFolder) -> str:
    return str(folder.attributes["backbone"].get("name", ""))


def _fits(
    folder: FeatureSetFolder, key: str | None, name: str | None, backbone: str | None
) -> bool:
    own = folder.attributes["name"]
    return (
        (key is None or folder.key.startswith(key) or own == key)
        and (name is None or own == name)
        and (backbone is None or _alias(folder) == backbone)
    )


def _ambiguous(folders: Sequence[FeatureSetFolder]) -> str:
    first = folders[0]
    lines = [f"  {one.key}  {one.attributes['name']}" for one in folders]
    lines += [
        f"  {other.key} differs from {first.key} in {describe_difference(first, other)}"
        for other in folders[1:]
    ]
    return f"{len(folders)} feature sets fit; choose one with --feature-set KEY:\n" + "\n".join(
        lines
    )


def describe_difference(one: FeatureSetFolder, other: FeatureSetFolder) -> str:
    """Say field by field how two feature sets differ."""
    if one.plan is None or other.plan is None:
        return "being imported, without a plan"
    return plan_difference(one.plan, other.plan)


def plan_difference(one: ExtractPlan, other: ExtractPlan) -> str:
    """Say field by field how two plans differ: "image_size: [224, 224] -> [448, 448]"."""
    parts = [
        f"{name}: {_short(mine)} -> {_short(theirs)}"
        for name, (mine, theirs) in one.differences(other).items()
    ]
    return "; ".join(parts) or "nothing"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."

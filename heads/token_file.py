"""An adapted identity as a tiny file: its token, and what else was trained for it.

A safetensors file with ``token`` (width,), float32, or int8 to be multiplied by the ``scale``
among its metadata, and ``head.NAME`` for each weight of the head that was trained too. Its
metadata name the ``run``, the first digits of the SHA-256 of its ``weights``, the ``identity``,
and the ``mode`` where that is not "token". Of each image that was learned from the first 8 digits
of its key are noted beside the run, in ``tokens/HASH.json`` by the file's SHA-256, so that a token
stays tiny; where that cannot be written, they are the file's ``support``, one after another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featstore.errors import FormatError, NotFoundError, invalid
from featstore.files import write_bytes, write_json
from heads.adapt_modes import TOKEN, free_part
from heads.identity_token import IdentityToken
from heads.model import Model
from heads.runs import WEIGHTS, Run

DTYPES = ("float32", "int8")
_HASH_DIGITS = 16
_LARGEST_CODE = 127
_SUPPORT_DIGITS = 8  # of an image's key
_NOTES = "tokens"  # folder of a run


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """An adapted identity, as it is saved."""

    run_id: str
    weights_hash: str  # of the run's head
    identity: str
    token: Tensor  # (width,) float32
    mode: str = TOKEN
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # that were trained too, by name
    support: frozenset[str] = frozenset()  # what `support_of` gives, where no run notes it


def support_of(image_keys: Iterable[str]) -> frozenset[str]:
    """Name the images that a token was learned from, in few digits each."""
    return frozenset(key[:_SUPPORT_DIGITS] for key in image_keys)


def note_support(run: Run, path: Path, support: Collection[str]) -> bool:
    """Note beside a run what one of its token files was learned from; False: it cannot be."""
    try:
        write_json(_note_path(run, path), {"support": sorted(support)})
    except OSError:
        return False
    return True


def noted_support(run: Run, path: Path) -> frozenset[str]:
    """Give what `note_support` noted of a token file; nothing where it noted nothing."""
    note = _note_path(run, path)
    return frozenset(json.loads(note.read_text())["support"]) if note.is_file() else frozenset()


def _note_path(run: Run, path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return run.path / _NOTES / f"{digest[:_HASH_DIGITS]}.json"


def weights_hash(run: Run) -> str:
    """Name the weights of a run's head."""
    digest = hashlib.sha256((run.path / WEIGHTS).read_bytes())
    return digest.hexdigest()[:_HASH_DIGITS]


def as_stored(token_d: Tensor, dtype: str) -> Tensor:
    """Give the numbers that are read back after a token was saved: float32.

    Raises:
        InvalidInputError: There is no such dtype.
    """
    if dtype not in DTYPES:
        raise invalid("token_dtype", dtype, f"one of {', '.join(DTYPES)}")
    token_d = token_d.detach().float().cpu()
    if dtype == "float32":
        return token_d
    codes, scale = _encode(token_d)
    return codes.float() * scale


def write_token(path: Path, saved: TokenFile, *, dtype: str = "float32") -> int:
    """Write a token file; give its size in bytes.

    Args:
        path: File.
        saved: What is written.
        dtype: Of the token: "float32", or "int8" with one scale, a quarter of the size.

    Raises:
        InvalidInputError: There is no such dtype.
    """
    stored = as_stored(saved.token, dtype)
    metadata = {"run": saved.run_id, "weights": saved.weights_hash, "identity": saved.identity}
    if saved.mode != TOKEN:
        metadata["mode"] = saved.mode
    if saved.support:
        metadata["support"] = "".join(sorted(saved.support))
    if dtype == "int8":
        stored, scale = _encode(saved.token.detach().float().cpu())
        metadata["scale"] = repr(scale)
    tensors = {"token": stored}
    for name, value in saved.weights.items():
        tensors[f"head.{name}"] = value.detach().cpu().contiguous()
    data = safetensors.torch.save(tensors, metadata)
    write_bytes(path, data)
    return len(data)


def _encode(token_d: Tensor) -> tuple[Tensor, float]:
    """Give int8 codes and the scale that they are multiplied by."""
    scale = float(token_d.abs().max()) / _LARGEST_CODE or 1.0
    return (token_d / scale).round().to(torch.int8), scale


def read_token(path: str | Path) -> TokenFile:
    """Read a token file.

    Raises:
        NotFoundError: There is no such file.
        FormatError: It is damaged, or no token file.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"No token file at {path}. Make one with `heads adapt`.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = about.get("support", "")
        starts = range(0, len(names), _SUPPORT_DIGITS)
        token = tensors.pop("token").float() * float(about.get("scale", 1.0))
        return TokenFile(
            run_id=about["run"],
            weights_hash=about["weights"],
            identity=about["identity"],
            token=token,
            mode=about.get("mode", TOKEN),
            weights={name.removeprefix("head."): value for name, value in tensors.items()},
            support=frozenset(names[start : start + _SUPPORT_DIGITS] for start in starts),
        )
    except (safetensors.SafetensorError, LookupError, ValueError) as error:
        raise FormatError(
            f"{path} is no token file, or damaged. Make it with `heads adapt`."
        ) from (error)


def use_token(model: Model, run: Run, saved: TokenFile) -> None:
    """Answer for the identity of a token file from now on.

    Args:
        model: Of the run.
        run: The run.
        saved: What `read_token` gave.

    Raises:
        InvalidInputError: It was adapted from another run, or the head takes no token.
    """
    head = model.head
    if not isinstance(head, IdentityToken):
        raise invalid("token", saved.identity, "left out: the head of this run takes none")
    if saved.weights_hash != weights_hash(run):
        expected = f"of run {run.run_id}; its head has other weights"
        hint = f"Adapt it: `heads adapt {run.run_id} --identity '{saved.identity}'`."
        raise invalid("token", f"a token of run {saved.run_id}", expected, hint=hint)
    head.set_token(saved.token)
    trained = free_part(head, saved.mode)
    if trained.keys() != saved.weights.keys():
        expected = f"the weights that {saved.mode} trains"
        raise invalid("token", ", ".join(saved.weights) or "no weights", expected)
    with torch.no_grad():
        for name, value in saved.weights.items():
            trained[name].copy_(value)

"""Weights from a seed or a file. A file loads whole or not at all."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from featstore.errors import InvalidInputError, invalid

Shapes = dict[str, tuple[int, ...]]

_PATCH_KERNEL = re.compile(
    r"(^|\.)(patch_embed\.proj|patch_embeddings\.projection|patchifier\.proj|visual\.conv1)"
    r"\.weight$"
)
_LAYER_SCALE = re.compile(r"gamma(_?\d)?")
_N_SHOWN = 4


def parse_random(weights: str) -> int | None:
    """Give the seed of "random" or "random:SEED"; None for anything else.

    Raises:
        InvalidInputError: The seed is not a number.
    """
    kind, _, seed = weights.partition(":")
    if kind != "random":
        return None
    if seed and not (seed.isascii() and seed.isdigit() and int(seed) < 2**63):
        raise invalid("weights", weights, "random or random:SEED, SEED a whole number from 0")
    return int(seed or 0)


def fill_layer_scale(model: nn.Module) -> None:
    """Set every LayerScale to 1, so that a random backbone is no straw man.

    Initial values near 1e-5 would leave each block almost the identity. The name tells them:
    ``gamma`` in a layer of its own or in a ConvNeXt block, ``gamma_1`` in EVA and DINOv3 blocks.
    """
    for name, parameter in model.named_parameters():
        if _LAYER_SCALE.fullmatch(name.rpartition(".")[2]):
            nn.init.ones_(parameter)


def read_shapes(path: Path) -> Shapes:
    """List the tensors in a weights file: name and shape, nested dicts flattened.

    Raises:
        InvalidInputError: There is no file, or it is no weights file.
    """
    if not path.is_file():
        raise InvalidInputError(f"No weights file at {path}. Check --weights.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        else:
            shapes = _shapes_of(_torch_load(path))
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise InvalidInputError(
            f"{path} is no weights file, or is damaged: {first_line(error)}. "
            "Give a .safetensors file or a state dict saved with torch.save."
        ) from error
    if not shapes:
        raise InvalidInputError(
            f"{path} holds no named tensors. Give a state dict saved with torch.save."
        )
    return shapes


def _torch_load(path: Path) -> Any:
    """Map a file of `torch.save` into memory, or read it where it has the format before 1.6."""
    import zipfile

    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _shapes_of(value: Any) -> Shapes:
    shapes: Shapes = {}
    if isinstance(value, Mapping):
        for name, one in value.items():
            if isinstance(one, torch.Tensor):
                shapes[str(name)] = tuple(one.shape)
            else:
                shapes |= _shapes_of(one)
    return shapes


def first_line(error: BaseException) -> str:
    """Give the first line of an error, cut short; its kind too where it is a bare word."""
    line = (str(error).splitlines() or [""])[0][:200].rstrip(".")
    return line if " " in line else f"{type(error).__name__} {line}".rstrip()


def check_patch(model: Any, shapes: Shapes, path: Path, architecture: str) -> None:
    """Refuse patch embeddings of another size, which timm would resample without a word.

    Raises:
        InvalidInputError: The file's patches have another number of pixels.
    """
    own = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "weight", None)
    if own is None:
        return
    for name, shape in shapes.items():
        if _PATCH_KERNEL.search(name) and math.prod(shape[1:]) != own[0].numel():
            raise InvalidInputError(
                f"{path} does not fit {architecture}: its patch embedding {name} has shape "
                f"{shape}, and {tuple(own.shape)} is needed. Give the weights of this architecture."
            )


def check_complete(left_out: Any, classifiers: tuple[str, ...], path: Path, name: str) -> None:
    """Make sure that a file filled every tensor of the backbone and held no other.

    The classifier is not part of a backbone: a file may have one, of any size, or none.

    Args:
        left_out: What `load_state_dict` gives: missing and unexpected names.
        classifiers: Dotted names of the classifier's modules.
        path: The file, for the message.
        name: The architecture, for the message.

    Raises:
        InvalidInputError: Something is missing or left over.
    """
    heads = tuple(f"{classifier.partition('.')[0]}." for classifier in classifiers)
    missing = [key for key in left_out.missing_keys if not key.startswith(heads)]
    unknown = [key for key in left_out.unexpected_keys if not key.startswith(heads)]
    if missing or unknown:
        found = [f"it lacks {_some(missing)}"] if missing else []
        found += [f"it has {_some(unknown)}, which has no place"] if unknown else []
        raise InvalidInputError(
            f"{path} does not fit {name}: {'; '.join(found)}. Give the weights of this "
            "architecture, whole."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(names[:_N_SHOWN]) + more


_NOTING = threading.Lock()


@contextlib.contextmanager
def noted_loads() -> Iterator[list[Any]]:
    """Note what each `load_state_dict` of this thread leaves out, instead of raising it.

    timm decides by itself how strict it is: some families are never loaded strictly, and none
    is where the number of classes differs. So the decision is taken from it.
    """
    notes: list[Any] = []
    original = nn.Module.load_state_dict
    here = threading.get_ident()

    def noting(
        module: nn.Module, state: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        if threading.get_ident() != here:
            return original(module, state, strict=strict, assign=assign)
        notes.append(original(module, state, strict=False, assign=assign))
        return notes[-1]

    with _NOTING:
        nn.Module.load_state_dict = noting  # type: ignore[method-assign, assignment]
        try:
            yield notes
        finally:
            nn.Module.load_state_dict = original  # type: ignore[method-assign]


def state_arrays(model: nn.Module) -> list[tuple[str, Any]]:
    """Give the whole state dict as named NumPy arrays; bfloat16 as its bits."""
    arrays = []
    for name, tensor in model.state_dict().items():
        host = tensor.detach().cpu()
        if host.dtype == torch.bfloat16:
            host = host.view(torch.int16)
        arrays.append((name, host.numpy()))
    return arrays

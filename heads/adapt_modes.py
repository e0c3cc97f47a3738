"""What of a head is trained for a new identity: its token, more than that, or something else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featstore.errors import not_found
from heads.identity_token import IdentityToken
from heads.peft import METHODS, add_method

TOKEN, DECODER = "token", "decoder"
SUBSETS = ("norms", "queries", "output")
MODES = (TOKEN, *(f"{TOKEN}+{subset}" for subset in SUBSETS), DECODER, *METHODS)
"""What may be trained; a method may stand after "token+" too and have options, see `heads.peft`."""

_TOKEN_LR, _DECODER_LR, _METHOD_LR = 1e-2, 1e-2, 1e-3
_BESIDE_TOKEN = 0.1  # learning rate of what is trained beside a token, as a share of the token's
_MOMENTUM = 0.9


def parts_of(mode: str) -> tuple[bool, str]:
    """Tell whether a mode trains the token, and what it trains beside it ("" is nothing).

    Raises:
        NotFoundError: There is no such mode.
    """
    if mode == TOKEN:
        return True, ""
    is_token, part = mode.startswith(f"{TOKEN}+"), mode.removeprefix(f"{TOKEN}+")
    known = SUBSETS if is_token else (DECODER,)
    if part not in known and part.partition(":")[0] not in METHODS:
        raise not_found("mode", mode, MODES)
    return is_token, part


def own_lr(mode: str) -> float:
    """Give the learning rate of a mode that names none."""
    is_token, part = parts_of(mode)
    if is_token:
        return _TOKEN_LR
    return _DECODER_LR if part == DECODER else _METHOD_LR


def count_trained(head: IdentityToken, mode: str) -> int:
    """Count the numbers that a mode trains."""
    is_token, _ = parts_of(mode)
    beside = free_part(copy.deepcopy(head), mode).values()
    return head.width * is_token + sum(parameter.numel() for parameter in beside)


def free_part(head: IdentityToken, mode: str, *, seed: int = 0) -> dict[str, nn.Parameter]:
    """Freeze a head, in place, but for what a mode trains beside the token; a method adds to it.

    Args:
        head: Head.
        mode: Mode.
        seed: Of the numbers that a method begins with.

    Returns:
        The parameters that are to be trained, by name.
    """
    _, part = parts_of(mode)
    head.requires_grad_(False)
    if part.partition(":")[0] in METHODS:
        return add_method(head, part, generator=torch.Generator().manual_seed(seed))
    starts: dict[str, Callable[[str], bool]] = {
        "": lambda name: False,
        "norms": lambda name: ".norm_" in name,
        "queries": lambda name: name == "queries",
        "output": lambda name: name.startswith(f"project.{len(head.project) - 1}."),
        DECODER: lambda name: name != "tokens" and not name.startswith("tail."),
    }
    chosen = {name: value for name, value in head.named_parameters() if starts[part](name)}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def optimizer_of(
    mode: str, token: Tensor | None, trained: Mapping[str, nn.Parameter], *, lr: float
) -> torch.optim.Optimizer:
    """Make Adam, or for the whole decoder the plain gradient with momentum of the abstract.

    Args:
        mode: Mode.
        token: One or several; None where the mode trains none.
        trained: What is trained beside it.
        lr: Of the token where there is one: all else then learns a tenth as fast.
    """
    if mode == DECODER:
        return torch.optim.SGD(list(trained.values()), lr=lr, momentum=_MOMENTUM)
    if token is None:
        return torch.optim.Adam(list(trained.values()), lr=lr)
    beside: dict[str, Any] = {"params": list(trained.values()), "lr": lr * _BESIDE_TOKEN}
    return torch.optim.Adam([{"params": [token]}, beside], lr=lr)

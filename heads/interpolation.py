"""A first token for a new identity: those of identities that look alike, mixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from heads.base import TapTokens

_HIDDEN, _STEPS, _LR = 16, 300, 1e-2


def descriptors(inputs: Sequence[TapTokens]) -> Tensor:
    """Describe images by the class token of the first tap, else the mean of its patches.

    Returns:
        (batch, dim), each of length 1.
    """
    first = inputs[0]
    if first.prefix is not None:
        return functional.normalize(first.prefix[:, 0].float(), dim=1)
    patch_btd = first.filled(torch.float32)
    if first.valid is None:
        return functional.normalize(patch_btd.mean(dim=1), dim=1)
    return functional.normalize(patch_btd.sum(dim=1) / first.valid.sum(dim=1, keepdim=True), dim=1)


def interpolated_token(tokens_nd: Tensor, known_nc: Tensor, new_c: Tensor, *, seed: int) -> Tensor:
    """Mix trained tokens by how alike their identities are to a new one.

    A small perceptron of the cosine similarity, then a softmax over identities, gives the
    weights. It learns to mix each trained token from all others (least squares), as if that
    identity were new.

    Args:
        tokens_nd: (identities, width): trained.
        known_nc: (identities, dim): means of `descriptors` of their images.
        new_c: (dim,): that of the new one.
        seed: Of the perceptron's first weights.

    Returns:
        (width,).

    Source:
        HEADS.md 3.1; what the weights are fitted to is our choice.
    """
    tokens_nd = tokens_nd.detach().float()
    known_nc = functional.normalize(known_nc.to(tokens_nd), dim=1)
    similar_nn = known_nc @ known_nc.T
    is_self = torch.eye(len(tokens_nd), dtype=torch.bool, device=tokens_nd.device)
    others = similar_nn[~is_self]
    if len(tokens_nd) < 3:  # one or two: there is nothing to learn a choice from
        return tokens_nd.mean(dim=0)
    middle, spread = others.mean(), others.std().clamp(min=1e-6)

    def weights(similar: Tensor, hidden: Tensor | None = None) -> Tensor:
        logits = mlp(((similar - middle) / spread)[..., None])[..., 0]
        return (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)).softmax(-1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = nn.Sequential(nn.Linear(1, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, 1)).to(tokens_nd)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=_LR)
    for _ in range(_STEPS):
        loss = functional.mse_loss(weights(similar_nn, is_self) @ tokens_nd, tokens_nd)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return weights(known_nc @ functional.normalize(new_c.to(tokens_nd), dim=0)) @ tokens_nd

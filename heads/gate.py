"""The sparse gate: taps mixed by weights that are learned, most of them zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featstore.errors import invalid

TEMPERATURE = 0.5


class SparseGate(nn.Module):
    """Mix taps into `n_out` maps, each of them a weighted mean of its `k` best taps.

    One score a tap and output, ``n_layers * n_out`` parameters. Forward, the softmax over the
    taps is kept at the `k` highest scores of each output and divided by its sum. Backward, every
    score gets the gradient of its weight as it stands, besides that through the softmax, so that
    a tap that is off can come back.

    Source:
        ViT-Split, arXiv:2506.03433, appendix B.1 and equation 5; `LearnableGate` of the release
        (HEADS.md 2.1), where k = n_out = 4.
    """

    def __init__(self, n_layers: int, n_out: int, k: int) -> None:
        super().__init__()
        if n_out < 1:
            raise invalid("n_out", n_out, "a positive number of outputs")
        if k < 1:
            raise invalid("k", k, "a positive number of taps to keep")
        if n_layers < k:
            expected = f"{k} or more for a gate that keeps {k}"
            raise invalid("taps", n_layers, expected, hint="Name more with --tap, or keep fewer.")
        self.k = k
        self.scores = nn.Parameter(torch.rand(n_layers, n_out))

    def forward(self, taps_bl: Tensor) -> Tensor:
        """Mix taps of one shape.

        Args:
            taps_bl: (batch, taps, ...), in one order always.

        Returns:
            (batch, n_out, ...).
        """
        if taps_bl.ndim < 2 or taps_bl.shape[1] != len(self.scores):
            raise invalid("taps", tuple(taps_bl.shape), f"(batch, {len(self.scores)}, ...)")
        return torch.einsum("bl...,lo->bo...", taps_bl, self.weights().to(taps_bl.dtype))

    def weights(self) -> Tensor:
        """Give (taps, n_out), `k` of each column above zero, which together are one."""
        soft_lo = (self.scores / TEMPERATURE).softmax(dim=0)
        best = self.scores.topk(self.k, dim=0).indices
        sparse_lo = soft_lo * torch.zeros_like(soft_lo).scatter(0, best, 1.0)
        # The difference is exactly zero, and has the gradient of the scores.
        gates_lo = sparse_lo + (self.scores - self.scores.detach())
        return gates_lo / gates_lo.sum(dim=0, keepdim=True)

    def learned(self) -> list[list[float]]:
        """Give the weights as numbers: a list a tap, in it a number an output."""
        with torch.no_grad():
            return self.weights().double().tolist()

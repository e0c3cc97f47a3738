"""Nearest neighbours: what the training tokens most alike have for targets. Nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import invalid
from heads.base import TapTokens
from heads.tasks import Task
from heads.token_targets import Batches, TokenReading, token_reading

NEIGHBOURS = (5, 10, 20)
TEMPERATURE = 0.07
_NUMBERS_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bank:
    """Training rows to be found again, with their values."""

    unit_md: Tensor  # of length 1
    values_mn: Tensor

    def nearest(self, reading: TokenReading, tokens: TapTokens, ks: Sequence[int]) -> Tensor:
        """Average the values of the nearest rows by cosine: (ks, batch, rows, n).

        Numbers are averaged alike. Classes are votes of weight ``exp(cosine / 0.07)``.
        """
        features_btd = _unit(reading, tokens)
        flat = features_btd.flatten(0, 1)
        of_a_row = max(len(self.unit_md), ks[-1] * reading.n_values)
        size = max(1, _NUMBERS_AT_ONCE // of_a_row)
        parts = (flat[start : start + size] for start in range(0, len(flat), size))
        answers = [self._nearest(part, ks, reading.is_class) for part in parts]
        return torch.cat(answers, dim=1).view(len(ks), *features_btd.shape[:2], -1)

    def _nearest(self, part_rd: Tensor, ks: Sequence[int], is_class: bool) -> Tensor:
        cosines_rk, found_rk = (part_rd @ self.unit_md.mT).topk(ks[-1], dim=1)
        # Relative to the nearest, so that no exponential overflows.
        votes_rk = ((cosines_rk - cosines_rk[:, :1]) / TEMPERATURE).exp()
        weight_rk = votes_rk if is_class else torch.ones_like(cosines_rk)
        values_rkn = self.values_mn[found_rk] * weight_rk[:, :, None]
        means = [values_rkn[:, :k].sum(dim=1) / weight_rk[:, :k].sum(1, keepdim=True) for k in ks]
        return torch.stack(means)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """The mean, or the vote, of the training rows most alike by cosine."""

    reading: TokenReading
    bank: _Bank
    k: int
    output_hw: tuple[int, int]

    def predict(self, tokens: TapTokens) -> Tensor:
        """Ask the `k` nearest rows of the bank: (batch, n, Ho, Wo), as a head gives it."""
        (values_btn,) = self.bank.nearest(self.reading, tokens, [self.k])
        return self.reading.output(values_btn, tokens, self.output_hw)


def fit_nearest(
    task: Task,
    train: Batches,
    validation: Batches,
    *,
    output_hw: tuple[int, int],
    neighbours: Sequence[int] | None = None,
    bank_size: int = 20_000,
    seed: int = 0,
) -> Nearest:
    """Keep a random bank of training rows with their values; choose k on `validation`.

    A row is a token, or for classification an image (see `heads.token_targets`).

    Args:
        task: Decides what is kept.
        train: Batches to draw the bank from, with targets of `Task.prepare`, stacked; each row of
            which something is known is as likely.
        validation: Batches to choose k on, by squared error: images that `train` has not.
        output_hw: Rows and columns of what `predict` gives.
        neighbours: Values of k to choose from; None: 5, 10 and 20, or all rows of a smaller bank.
        bank_size: Most rows to keep.
        seed: Of the draw.

    Raises:
        InvalidInputError: A part knows nothing, k exceeds the bank, or the task has no values at
            tokens.

    Source:
        Caron et al. 2021, DINO, arXiv:2104.14294, section 4.1 and appendix: weighted votes by
        cosine, temperature 0.07.
    """
    reading = token_reading(task)
    bank = _draw_bank(reading, train, bank_size, seed)
    size = len(bank.unit_md)
    ks = sorted({min(k, size) for k in NEIGHBOURS} if neighbours is None else neighbours)
    if not ks or ks[0] < 1 or ks[-1] > size:
        raise invalid("neighbours", neighbours, f"from 1 to the {size} rows of the bank")
    errors, weight = torch.zeros(len(ks), dtype=torch.float64), 0.0
    for tokens, targets in validation:
        rows = reading.rows(tokens, targets)
        difference = bank.nearest(reading, tokens, ks) - rows.values_btn
        errors += (rows.weight_bt * difference.square().sum(dim=3)).double().sum(dim=(1, 2))
        weight += float(rows.weight_bt.sum())
    if not weight:
        expected = "batches with at least one known value"
        raise invalid("validation", f"no known {reading.task}", expected)
    best = ks[int(errors.argmin())]
    return Nearest(reading=reading, bank=bank, k=best, output_hw=output_hw)


def _draw_bank(reading: TokenReading, batches: Batches, size: int, seed: int) -> _Bank:
    """Sample rows evenly from a stream: each gets a random key, the smallest keys stay."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.empty(0)
    bank: _Bank | None = None
    for tokens, targets in batches:
        rows = reading.rows(tokens, targets)
        chosen = rows.weight_bt.flatten() > 0
        unit = _unit(reading, tokens).flatten(0, 1)[chosen]
        values = rows.values_btn.flatten(0, 1)[chosen]
        keys = torch.cat([keys, torch.rand(len(unit), generator=generator)])
        if bank is not None:
            unit, values = torch.cat([bank.unit_md, unit]), torch.cat([bank.values_mn, values])
        kept = keys.argsort()[:size]
        keys, bank = keys[kept], _Bank(unit_md=unit[kept], values_mn=values[kept])
    if bank is None or not len(bank.unit_md):
        raise invalid("train", f"no known {reading.task}", "batches with at least one known value")
    return bank


def _unit(reading: TokenReading, tokens: TapTokens) -> Tensor:
    return functional.normalize(reading.features(tokens), dim=2)

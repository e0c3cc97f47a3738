"""The sparse gate against a plain form in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featstore.errors import InvalidInputError
from heads.gate import TEMPERATURE, SparseGate


def plain_weights(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, the softmax and what is kept of it, column by column."""
    raised = np.exp(scores / TEMPERATURE - (scores / TEMPERATURE).max(axis=0))
    soft = raised / raised.sum(axis=0)
    kept = np.zeros_like(soft, dtype=bool)
    for column in range(scores.shape[1]):
        kept[np.argsort(-scores[:, column])[:k], column] = True
    sparse = np.where(kept, soft, 0.0)
    return sparse / sparse.sum(axis=0), soft, kept


def plain_gradient(scores: np.ndarray, k: int, from_weights: np.ndarray) -> np.ndarray:
    """Gradient of the scores, of that of the weights: by hand, straight through plus softmax."""
    weights, soft, kept = plain_weights(scores, k)
    total = np.where(kept, soft, 0.0).sum(axis=0)
    from_gates = (from_weights - (from_weights * weights).sum(axis=0)) / total
    from_soft = np.where(kept, from_gates, 0.0)
    through = soft * (from_soft - (from_soft * soft).sum(axis=0)) / TEMPERATURE
    return from_gates + through


@pytest.fixture(params=[(7, 4, 4), (5, 1, 2), (3, 3, 1), (4, 2, 4)], ids=str)
def gate(request):
    torch.manual_seed(0)
    return SparseGate(*request.param).double()


def test_output_and_gradients_are_those_of_the_plain_form(gate):
    n_layers, n_out = gate.scores.shape
    generator = np.random.default_rng(0)
    taps = generator.standard_normal((2, n_layers, 6, 3))
    wanted = generator.standard_normal((2, n_out, 6, 3))
    given = torch.tensor(taps, requires_grad=True)
    mixed = gate(given)
    (mixed * torch.tensor(wanted)).sum().backward()

    scores = gate.scores.detach().numpy()
    weights, _, _ = plain_weights(scores, gate.k)
    from_weights = np.einsum("bltd,botd->lo", taps, wanted)
    np.testing.assert_allclose(
        mixed.detach().numpy(), np.einsum("bltd,lo->botd", taps, weights), atol=1e-12
    )
    np.testing.assert_allclose(
        given.grad.numpy(), np.einsum("botd,lo->bltd", wanted, weights), atol=1e-12
    )
    np.testing.assert_allclose(
        gate.scores.grad.numpy(), plain_gradient(scores, gate.k, from_weights), atol=1e-10
    )


def test_each_output_is_a_mean_of_k_taps(gate):
    learned = np.array(gate.learned())
    assert learned.shape == tuple(gate.scores.shape)
    np.testing.assert_array_equal((learned != 0).sum(axis=0), gate.k)
    np.testing.assert_allclose(learned.sum(axis=0), 1.0, atol=1e-12)
    np.testing.assert_allclose(learned, plain_weights(gate.scores.detach().numpy(), gate.k)[0])


def test_a_gate_that_keeps_one_tap_of_a_column_passes_it_on():
    gate = SparseGate(3, 2, 1)
    with torch.no_grad():
        gate.scores.copy_(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.3]]))
    taps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(gate(taps), taps[:, [1, 0]])
    assert gate.learned() == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_a_tap_that_is_off_comes_back_where_it_helps():
    torch.manual_seed(0)
    gate = SparseGate(3, 1, 1)
    with torch.no_grad():
        gate.scores.copy_(torch.tensor([[0.9], [0.2], [0.1]]))
    taps = torch.randn(64, 3, 1)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (gate(taps)[:, 0] - taps[:, 1]).square().mean().backward()
        optimizer.step()
    assert gate.learned() == [[0.0], [1.0], [0.0]]


def test_scores_begin_between_zero_and_one():
    torch.manual_seed(0)
    scores = SparseGate(200, 50, 4).scores.detach()
    assert 0 <= float(scores.min()) < 0.01
    assert 0.99 < float(scores.max()) < 1
    assert abs(float(scores.mean()) - 0.5) < 0.01


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((3, 4, 4), "`taps` must be 4 or more"),
        ((3, 0, 1), "n_out"),
        ((3, 1, 0), "`k` must be"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(arguments, match):
    with pytest.raises(InvalidInputError, match=match):
        SparseGate(*arguments)


def test_other_taps_than_it_was_made_for_are_refused():
    with pytest.raises(InvalidInputError, match=r"\(batch, 3, \.\.\.\)"):
        SparseGate(3, 2, 2)(torch.zeros(2, 4, 5, 6))

"""Heads and metrics of classes of whole images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss, top_k_accuracy_score

from featstore.errors import InvalidInputError
from featstore.types import TapShape
from heads.base import TapTokens
from heads.build import build_head
from heads.metrics.labels import label_stats, summarise_labels

TAP = TapShape(tap="norm", dim=128, grid=(2, 3), n_prefix=2)


def make_tokens(*, valid=None, dim=128):
    generator = torch.Generator().manual_seed(0)
    return TapTokens(
        patch=torch.randn(4, 6, dim, generator=generator),
        prefix=torch.randn(4, 2, dim, generator=generator),
        grid=(2, 3),
        valid=valid,
    )


@pytest.mark.parametrize(("pool", "factor"), [("mean", 1), ("cls", 1), ("both", 2)])
def test_the_linear_pool_is_one_matrix(pool, factor):
    head = build_head("linear_pool", taps=[TAP], n_outputs=5, options={"pool": pool})
    assert head.n_parameters() == (factor * 128 + 1) * 5
    tokens = make_tokens()
    parts = {"mean": [tokens.patch.mean(1)], "cls": [tokens.prefix[:, 0]]}
    pooled = torch.cat(parts.get(pool) or [*parts["mean"], *parts["cls"]], 1)
    normed = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(head([tokens])[:, :, 0, 0], head.project(normed))


def test_the_attentive_pool_is_attention_of_one_query():
    torch.manual_seed(0)
    head = build_head("attentive_pool", taps=[TAP], n_outputs=5).eval()
    assert head.n_parameters() == 2 * 128**2 + 128 + 129 * 5
    assert head.n_heads == 2
    tokens = make_tokens()
    normed = tokens.patch / (1 + 1e-5) ** 0.5
    answers = []
    for part in (slice(0, 64), slice(64, 128)):
        key, value = (layer(normed)[..., part] for layer in (head.key, head.value))
        weights = (key @ head.query[part] / 8).softmax(1)
        answers.append((weights[..., None] * value).sum(1))
    expected = head.project(torch.cat(answers, 1))
    torch.testing.assert_close(head([tokens])[:, :, 0, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear_pool", "attentive_pool"])
def test_padding_does_not_count(name):
    torch.manual_seed(0)
    head = build_head(name, taps=[TAP], n_outputs=3)
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[1, 4:] = False
    tokens = make_tokens(valid=valid)
    first = head([tokens])
    tokens.patch[1, 4:] = float("nan")
    torch.testing.assert_close(head([tokens]), first)


def test_several_taps_are_read_together():
    taps = [TAP, TapShape(tap="block:1", dim=64, grid=(2, 3), n_prefix=2)]
    for name in ("linear_pool", "attentive_pool"):
        head = build_head(name, taps=taps, n_outputs=3)
        assert head([make_tokens(), make_tokens(dim=64)]).shape == (4, 3, 1, 1)


def test_what_cannot_be_pooled_is_said():
    tap = TapShape(tap="stage:1", dim=8, grid=(2, 3))
    with pytest.raises(InvalidInputError, match="without a class token"):
        build_head("linear_pool", taps=[tap], n_outputs=3, options={"pool": "cls"})
    with pytest.raises(InvalidInputError, match="a divisor of the width 128"):
        build_head("attentive_pool", taps=[TAP], n_outputs=3, options={"heads": 5})
    head = build_head("linear_pool", taps=[TAP], n_outputs=3)
    one = make_tokens()
    with pytest.raises(InvalidInputError, match="at least 2"):
        head([TapTokens(patch=one.patch[:1], prefix=one.prefix[:1], grid=(2, 3))])


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    n, classes = 200, 8
    truth = rng.choice(classes, n, p=np.arange(1, 9) / 36)
    logits = rng.normal(size=(n, classes)) + 2 * np.eye(classes)[truth]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    lines = [label_stats(row, int(t)) for row, t in zip(log_p, truth, strict=True)]
    found = {m.name: m.value for m in summarise_labels(lines, [None] * n, n_classes=classes)}
    assert found["top1"] == pytest.approx((log_p.argmax(1) == truth).mean())
    assert found["balanced"] == pytest.approx(balanced_accuracy_score(truth, log_p.argmax(1)))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(truth, log_p, k=5))
    assert found["ce"] == pytest.approx(log_loss(truth, np.exp(log_p)))


def test_a_constant_answer_is_right_as_often_as_chance():
    lines = [label_stats(np.full(4, np.log(0.25)), t) for t in (0, 1, 2, 3)]
    found = {m.name: m.value for m in summarise_labels(lines, [None] * 4, n_classes=4)}
    assert found["top1"] == 0.0
    assert found["ce"] == pytest.approx(np.log(4))

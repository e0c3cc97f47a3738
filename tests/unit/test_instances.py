from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from featstore.errors import InvalidInputError
from featstore.geometry import place
from heads.metrics.clusters import cluster_stats, summarise_clusters
from heads.tasks import build_task


def squash(source_hw):
    return place(source_hw=source_hw, input_hw=(32, 32), crop=None, resize="squash", view="plain")


def fitted(ids_bhw, **options):
    task = build_task("instances", {"embedding": 4, "restarts": 2, **options})
    prepared = [
        task.prepare(ids, np.ones(ids.shape, bool), squash(ids.shape), (8, 8)) for ids in ids_bhw
    ]
    arrays = {"ids": np.stack([each["ids"] for each in prepared])}
    torch.manual_seed(0)
    task.fit_to(SimpleNamespace(arrays=arrays))
    return task, torch.from_numpy(arrays["ids"])


def blocks(*numbers):
    ids = np.zeros((16, 16), np.int32)
    for place_, number in enumerate(numbers):
        ids[4 * place_ : 4 * place_ + 4, 4:12] = number
    return ids


def test_each_instance_of_each_image_is_a_class_and_background_is_one_for_all():
    task, ids = fitted([blocks(7, 2), blocks(), blocks(9, 3, 5)])
    assert task.criterion.weight.shape == (1 + 2 + 3, 4)
    numbers = task.criterion.numbers(ids.flatten(1).long(), torch.arange(3))
    assert sorted(numbers[0].unique().tolist()) == [0, 1, 2]
    assert numbers[1].unique().tolist() == [0]
    assert sorted(numbers[2].unique().tolist()) == [0, 3, 4, 5]


def test_the_loss_is_cross_entropy_over_all_instances():
    task, ids = fitted([blocks(1, 2), blocks(3)], pixels=40_000)
    output = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    numbers = task.criterion.numbers(ids.flatten(1).long(), torch.arange(2))
    logits = output.flatten(2).mT @ task.criterion.weight.mT
    expected = functional.cross_entropy(logits.flatten(0, 1), numbers.flatten())
    found = task.loss(output, {"ids": ids, "slot": torch.arange(2)})
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # random pixels


def test_the_order_of_a_batch_does_not_mix_up_instances():
    task, ids = fitted([blocks(1, 2), blocks(3, 4, 5)])
    forward = task.criterion.numbers(ids.flatten(1).long(), torch.tensor([0, 1]))
    backward = task.criterion.numbers(ids.flip(0).flatten(1).long(), torch.tensor([1, 0]))
    assert torch.equal(forward, backward.flip(0))


def test_the_held_out_loss_falls_as_instances_come_apart():
    task, ids = fitted([blocks(1, 2)])
    near = functional.one_hot(ids.long() + 0, 4).permute(0, 3, 1, 2).float()
    losses = [float(task.held_out_loss(k * near, {"ids": ids})) for k in (0.1, 1.0, 5.0)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.01


def test_embeddings_that_tell_instances_apart_score_one_and_noise_scores_none():
    rng = np.random.default_rng(0)
    ids = np.repeat([0, 1, 2, 3], 200)
    centres = rng.normal(size=(4, 8)) * 10
    found = cluster_stats(
        centres[ids] + rng.normal(size=(800, 8)), ids, large_pixels=150, restarts=3
    )
    assert found == {"n_instances": 3.0, "n_large": 3.0, "ari_fg": 1.0, "ari_all": 1.0}
    noise = cluster_stats(rng.normal(size=(800, 8)), ids, large_pixels=300, restarts=3)
    assert abs(noise["ari_fg"]) < 0.05
    assert noise["n_large"] == 0


def test_background_that_looks_like_a_thing_costs_only_the_release_metric():
    ids = np.repeat([0, 1, 2], 100)
    embedding = np.where(ids[:, None] == 2, 5.0, 0.0) + np.zeros((300, 2))
    embedding[:50] += [0.0, 9.0]  # half of the background is a thing of its own
    embedding[50:100] += [0.1, 0.0]
    found = cluster_stats(embedding, ids, large_pixels=10, restarts=3)
    assert found["ari_fg"] == 1.0
    embedding[200:250] += [9.0, 0.0]  # and one instance has two parts
    found = cluster_stats(embedding, ids, large_pixels=10, restarts=3)
    assert found["ari_fg"] < 1


def test_images_with_fewer_than_two_instances_do_not_count():
    def line(n, n_large, ari):
        return {"n_instances": n, "n_large": n_large, "ari_fg": ari, "ari_all": ari / 2}

    lines = [line(1.0, 1.0, 0.0), line(2.0, 2.0, 0.4), line(5.0, 3.0, 0.8)]
    found = {m.name: m.value for m in summarise_clusters(lines, [None] * 3)}
    assert found["ari_fg"] == pytest.approx(0.6)
    assert found["ari_fg@large"] == pytest.approx(0.8)
    assert found["ari_all@large"] == pytest.approx(0.4)
    with pytest.raises(InvalidInputError, match="at least one with two instances"):
        summarise_clusters(lines[:1], [None])


def test_labels_without_a_thing_are_refused():
    with pytest.raises(InvalidInputError, match="No label shows an instance"):
        fitted([blocks()])


def test_a_prediction_is_a_cluster_a_pixel_at_the_image_s_own_size():
    task = build_task("instances", {"embedding": 4, "clusters": 2, "restarts": 1})
    halves = np.zeros((4, 8, 8), np.float32)
    halves[0, :, 4:] = 9
    found = task.at_source(halves, squash((16, 20)))
    assert found.shape == (16, 20)
    assert found.dtype == np.int32
    assert set(np.unique(found)) == {1, 2}
    assert (found[:, 0] != found[:, -1]).all()

"""A planted control: identities that a token can tell, and identities that nobody can.

Features tell where the joints are, exactly; where an identity marks its keypoints beside the
joints, nothing but the identity tells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from featstore.datasets import open_dataset
from featstore.datasets.creatures import SKELETON
from featstore.types import TapShape
from heads.adaptation import Images, Recipe, Start, adapt_many
from heads.base import TapTokens
from heads.build import build_head
from heads.protocol.statistics import Errors, Resamples
from heads.tasks import build_task

pytestmark = pytest.mark.slow

K, N_IDENTITIES, N_HELD_OUT, N_EACH = len(SKELETON.names), 40, 6, 30
WIDTH, SHOTS, SEEDS, STEPS = 24, 5, 3, 300
TAP = TapShape(tap="joints", dim=WIDTH, grid=(1, K))


@dataclass(frozen=True, kw_only=True)
class World:
    """Pictures of one world: what the head reads, and the targets of the task."""

    images: Images
    identity: np.ndarray

    def of(self, identity: int) -> np.ndarray:
        return np.flatnonzero(self.identity == identity)


def keypoints(offsets: str) -> tuple[np.ndarray, np.ndarray]:
    """Give (images, K, 2) shares of the crop, and the identities."""
    n_images = N_IDENTITIES * N_EACH
    reader = open_dataset(f"creatures:n={n_images},identities={N_IDENTITIES},offsets={offsets}")
    places, identities = [], []
    for item in reader.items():
        x0, y0, x1, _ = item.crop
        points = np.array(item.attributes["keypoints"])[:, :2]
        places.append((points - [x0, y0]) / (x1 - x0))
        identities.append(int(item.label.removeprefix("creature_")))
    return np.stack(places).astype(np.float32), np.array(identities)


def make_world(offsets: str) -> World:
    joints, identity = keypoints("none")
    marked, _ = keypoints(offsets)
    facing = np.sign(joints[:, 2, 0] - joints[:, 4, 0])
    tokens = np.zeros((len(joints), K, WIDTH), np.float32)
    tokens[..., :2] = 6 * (joints - 0.5)
    tokens[..., 2] = 2 * facing[:, None]
    tokens[..., 3 : 3 + K] = 4 * np.eye(K)
    known = np.where(identity < N_IDENTITIES - N_HELD_OUT, identity, -1)
    return World(
        images=Images(
            inputs=[TapTokens(patch=torch.from_numpy(tokens), grid=(1, K))],
            targets={
                "points": torch.from_numpy(marked),
                "visible": torch.ones(len(marked), K),
                "identity": torch.from_numpy(known),
            },
        ),
        identity=identity,
    )


def train(world: World, **options):
    torch.manual_seed(0)
    names = "|".join(f"creature_{number:03d}" for number in range(N_IDENTITIES - N_HELD_OUT))
    options = {"heads": 4, "ff": 256, "positions": "none", "tokens": names, **options}
    head = build_head("identity_token", taps=[TAP], n_outputs=2 * K, options=options)
    task = build_task("pose", {"names": "|".join(SKELETON.names), "identities": names})
    scales = head.lr_scales()
    groups = [
        {"params": [p], "lr": 3e-3 * (10 if name.startswith(tuple(scales)) else 1)}
        for name, p in head.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    n_steps = 1600
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=n_steps
    )
    trained = torch.from_numpy(np.flatnonzero(world.identity < N_IDENTITIES - N_HELD_OUT))
    for _ in range(n_steps):
        batch = world.images.rows(trained[torch.randint(len(trained), (32,))])
        optimizer.zero_grad()
        head.learn(batch.inputs, batch.targets, task).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return head, task


def errors(output: Tensor, world: World, test: np.ndarray) -> np.ndarray:
    """Give the sum of squared distances of each image."""
    places = output[:, :, 0, 0].reshape(len(test), K, 2)
    gaps = places - world.images.targets["points"][torch.from_numpy(test)]
    return gaps.double().square().sum(dim=(1, 2)).numpy()


def adapted(head, task, world: World, identity: int, mode: str, lr: float) -> np.ndarray:
    """Adapt with every seed, and give (seeds, test images): without any image for "mean"."""
    own = world.of(identity)
    pool, test = own[::2], own[1::2]
    starts = []
    for seed in range(SEEDS):
        drawn = np.random.default_rng(seed).permutation(pool)[:SHOTS]
        support = () if mode == "mean" else tuple(drawn.tolist())
        starts.append(Start(token=head.mean_token().detach(), support=support, seed=seed))
    recipe = Recipe(mode="token" if mode == "mean" else mode, steps=STEPS, lr=lr)
    asked = world.images.rows(torch.from_numpy(test))
    found = adapt_many(head, task, world.images, starts, recipe, asked=asked)
    return np.stack([errors(one.output, world, test) for one in found])


def compare(head, task, world: World, lrs: dict[str, float]):
    """Give the RMSE of each mode by identity, and the token's reduction with its interval."""
    rmses = {mode: [] for mode in lrs}
    reductions = []
    for identity in range(N_IDENTITIES - N_HELD_OUT, N_IDENTITIES):
        found = {mode: adapted(head, task, world, identity, mode, lr) for mode, lr in lrs.items()}
        counts = np.full(N_EACH // 2, float(K))
        kept = {mode: Errors(sums_si=sums, counts_i=counts) for mode, sums in found.items()}
        for mode, own in kept.items():
            rmses[mode].append(own.rmse())
        draws = Resamples([str(n) for n in range(len(counts))], n_seeds=SEEDS, n_resamples=2000)
        reductions.append(draws.compare(kept["mean"], kept["token"]).reduction)
    return {mode: float(np.mean(values)) for mode, values in rmses.items()}, reductions


LRS = {"mean": 1e-2, "token": 3e-2, "decoder": 3e-3}


def test_a_token_recovers_what_fine_tuning_gains_where_only_identity_tells():
    world = make_world("planted")
    head, task = train(world)
    rmses, reductions = compare(head, task, world, LRS)
    assert rmses["mean"] - rmses["token"] >= 0.8 * (rmses["mean"] - rmses["decoder"])
    assert rmses["token"] < 0.6 * rmses["mean"]
    assert sum(each.sign > 0 for each in reductions) == N_HELD_OUT


def test_no_token_helps_where_identity_tells_nothing():
    world = make_world("shuffled")
    head, task = train(world)
    lrs = {name: LRS[name] for name in ("mean", "token")}
    _, reductions = compare(head, task, world, lrs)
    assert sum(each.sign <= 0 for each in reductions) >= 0.9 * N_HELD_OUT

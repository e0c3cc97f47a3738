"""Cells of a protocol whose errors are chosen: what was adapted how far off which instance is."""

from __future__ import annotations

from heads.protocol.cells import READINGS, Cell, Outcome, Unit
from heads.protocol.plan import MAIN, Way

N_TEST = 8
PARAMETERS = {"token": 8, "decoder": 1000, "token+norms": 40}


def way(mode="token", shots=5, *, init="mean", variant=MAIN):
    return Way(variant=variant, mode=mode, init=init, shots=shots)


def cell(identity, of, distances, *, n_seeds=3, error=None):
    """A cell whose instances are off by `distances`, the same for all, or one an instance."""
    each = distances if isinstance(distances, list) else [distances] * N_TEST
    outcomes = [
        Outcome(
            squares=2 * d**2,
            points=2,
            hits=dict.fromkeys(READINGS, 2 * (d <= 0.05)),
            counted=dict.fromkeys(READINGS, 2),
            oks=0.7,
            score=1.0,
        )
        for d in each
    ]
    seeds = n_seeds if of.shots else 1
    unit = Unit(fold=0, way=of, identity=identity, is_tuning=False, lr=0.1, n_seeds=seeds, steps=3)
    return Cell(
        unit=unit,
        parameters=PARAMETERS[of.mode] if of.shots else 0,
        seconds=1.0,
        error=error,
        outcomes=() if error else (tuple(outcomes),) * seeds,
        groups=tuple(f"image {n // 2}" for n in range(N_TEST)),
    )


def cells():
    found = []
    for name, gained in (("fox", 0.08), ("hare", 0.0)):
        spread = [0.2 - gained + 0.001 * n for n in range(N_TEST)]
        found += [
            cell(name, way(shots=0), [0.2 + 0.001 * n for n in range(N_TEST)]),
            cell(name, way(), spread),
            cell(name, way("decoder"), 0.1),
            cell(name, way(init="random"), 0.3),
        ]
    return found

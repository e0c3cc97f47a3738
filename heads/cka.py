"""How alike the taps of a feature set are: linear CKA of every two of them, streamed.

Axis letters: ``n`` samples of a mini-batch, ``d`` dim of a tap, ``t`` tokens, ``b`` images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featstore import open as open_store
from featstore.api import FeatureSet
from featstore.errors import invalid
from featstore.select import select_rows
from featstore.types import Progress, ProgressCallback, TapShape, ignore_progress
from heads.boundary import MIN_TAPS, Proposal, propose
from heads.model import NormTensors, norm_tensors, valid_tokens
from heads.setup import TAP_NORMS
from heads.tap_choice import several_taps

SAMPLES = ("images", "tokens")
TOKENS_AN_IMAGE = 16  # so that a mini-batch of tokens is of many images
MIN_SAMPLES = 4  # of a mini-batch: the debiased HSIC divides by n - 3
MIN_BATCH = 2 * MIN_SAMPLES  # so that the halves of one and a bit are still enough
_READ_BYTES = 32 * 2**20  # of all taps, as float32
_CONSTANT = 1e-9  # of the largest number: what differs by less is rounding
_PLAIN = "view = 'plain'"  # a mirrored view is the same image again


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCka:
    """The CKA of every two taps, how it was measured, and what it suggests."""

    feature_set: str
    name: str
    taps: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]  # 1 on the diagonal; near 0, of either sign: unlike
    samples: str  # "images" or "tokens"
    tap_norm: str
    n_images: int
    n_samples: int
    n_batches: int
    proposal: Proposal | None  # None where there are too few blocks or stages

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


class MinibatchCka:
    """The debiased estimate from mini-batches: it holds one number a pair of taps.

    HSIC is averaged over mini-batches, and CKA is made of the averages. One mini-batch of all
    samples gives the debiased CKA itself.

    Source:
        Nguyen et al. 2021, arXiv:2010.15327, equations 2 and 3; the debiased HSIC is that of
        Song et al. 2012, JMLR 13, in the U-centred form of Szekely & Rizzo 2014.
    """

    def __init__(self, n_taps: int) -> None:
        self._sums = np.zeros((n_taps, n_taps))
        self.n_batches = 0
        self.n_samples = 0

    def add(self, samples: Sequence[np.ndarray]) -> None:
        """Take a mini-batch: the same samples as each tap has them, (n, d) each.

        Raises:
            InvalidInputError: There are fewer than four samples.
        """
        n = len(samples[0])
        if n < MIN_SAMPLES:
            raise invalid("samples", n, f"at least {MIN_SAMPLES} in each mini-batch")
        centred = np.stack([_u_centred(each) for each in samples]).reshape(len(samples), -1)
        self._sums += centred @ centred.T / (n * (n - 3))
        self.n_batches += 1
        self.n_samples += n

    def matrix(self) -> np.ndarray:
        """Give the CKA of every two taps; NaN for one that is the same for all samples."""
        size = np.sqrt(self._sums.diagonal())
        with np.errstate(invalid="ignore"):
            return self._sums / np.outer(size, size)


def _u_centred(samples_nd: np.ndarray) -> np.ndarray:
    """Give the products of every two samples, centred without the diagonal."""
    n = len(samples_nd)
    wide = samples_nd.astype(np.float64)
    # The mean drops out of what follows; taken away first, it costs no digits.
    centred = wide - wide.mean(axis=0)
    if np.abs(centred).max() <= _CONSTANT * np.abs(wide).max():
        return np.zeros((n, n))
    products = centred @ centred.T
    np.fill_diagonal(products, 0.0)
    rows = products.sum(axis=1)
    products -= (rows[:, None] + rows[None, :]) / (n - 2)
    products += rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(products, 0.0)
    return products


def layer_cka(
    store: str | Path,
    *,
    feature_set: str | None = None,
    taps: Sequence[str] = (),
    samples: str = "images",
    batch_size: int = 256,
    tap_norm: str = "none",
    where: str | None = None,
    kp: int = 4,
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
) -> LayerCka:
    """Measure how alike the dense taps of a feature set are, in memory for one mini-batch.

    Args:
        store: The store.
        feature_set: Key, the start of one, or name; None where there is only one.
        taps: Dense taps; none: all that are stored.
        samples: "images": the mean of an image's patch tokens is a sample. "tokens": up to 16
            tokens of each image, drawn by `seed`, are one each; their grids must be equal.
        batch_size: Samples of a mini-batch, at most.
        tap_norm: "none": block outputs as stored; "final": after the backbone's final norm, as
            heads read them.
        where: One SQL expression over the view `samples`, like ``split = 'train'``.
        kp: Taps to propose.
        seed: Mixes the rows and draws the tokens.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: The store, the feature set, a tap or a row is not there.
        InvalidInputError: There are fewer than two dense taps or too few images, a tap is the
            same for all of them, or an option is wrong.
    """
    if samples not in SAMPLES:
        raise invalid("samples", samples, f"one of {', '.join(SAMPLES)}")
    if tap_norm not in TAP_NORMS:
        raise invalid("tap_norm", tap_norm, f"one of {', '.join(TAP_NORMS)}")
    if batch_size < MIN_BATCH:
        raise invalid("batch_size", batch_size, f"at least {MIN_BATCH}")
    opened = open_store(store)
    features = opened.feature_set(feature_set)
    shapes = several_taps(features, taps)
    reader = _Reader(features, shapes, samples=samples, tap_norm=tap_norm, seed=seed)
    condition = _PLAIN if where is None else f"({where}) and {_PLAIN}"
    rows = select_rows(features.folder, reader.names, condition)
    estimate = MinibatchCka(len(shapes))
    groups = _groups(rows, max(1, batch_size // reader.samples_an_image), seed)
    for done, group in enumerate(groups, start=1):
        estimate.add(reader.read(group))
        progress(Progress(stage="cka", done=done, total=len(groups)))
    matrix = estimate.matrix()
    _refuse_constant(matrix, reader.names)
    return LayerCka(
        feature_set=features.key,
        name=features.name,
        taps=reader.names,
        matrix=tuple(tuple(float(value) for value in row) for row in matrix),
        samples=samples,
        tap_norm=tap_norm,
        n_images=len(rows),
        n_samples=estimate.n_samples,
        n_batches=estimate.n_batches,
        proposal=_proposal(features, reader.names, matrix, kp),
    )


def _groups(rows: np.ndarray, size: int, seed: int) -> list[np.ndarray]:
    """Mix rows and cut them into mini-batches of one size, give or take one."""
    mixed = np.random.default_rng(seed).permutation(rows)
    return np.array_split(mixed, -(-len(rows) // size))


class _Reader:
    """Reads samples of some taps."""

    def __init__(
        self,
        features: FeatureSet,
        shapes: Sequence[TapShape],
        *,
        samples: str,
        tap_norm: str,
        seed: int,
    ) -> None:
        self.names = tuple(shape.tap for shape in shapes)
        self._features = features
        self._seed = seed
        self._is_tokens = samples == "tokens"
        self._grids: Mapping[str, tuple[int, int]] = {s.tap: s.grid for s in shapes if s.grid}
        if self._is_tokens and len(set(self._grids.values())) > 1:
            hint = "Use --samples images, or name taps of one grid."
            raise invalid("taps", dict(self._grids), "of one grid to compare tokens", hint=hint)
        grid = next(iter(self._grids.values()))
        self.samples_an_image = min(TOKENS_AN_IMAGE, grid[0] * grid[1]) if self._is_tokens else 1
        norm = features.final_norm() if tap_norm == "final" else None
        self._norm: NormTensors | None = None if norm is None else norm_tensors(norm, "cpu")
        row_bytes = sum(shape.bytes_per_row(4) for shape in shapes)
        self._rows_a_read = max(1, _READ_BYTES // row_bytes)

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Give the samples of some rows, (n, d) for each tap; equal ones at equal places."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.names}
        for batch in self._pieces(rows):
            placements = self._features.placements(batch.rows)
            seen = [placements[int(row)] for row in batch.rows]
            for name in self.names:
                valid = valid_tokens(seen, self._grids[name], torch.device("cpu"))
                tokens = self._normed(name, batch[name])
                is_valid = np.ones(tokens.shape[:2], bool) if valid is None else valid.numpy()
                take = self._drawn if self._is_tokens else _pooled
                parts[name].append(take(tokens, is_valid, batch.rows))
        return [np.concatenate(parts[name]) for name in self.names]

    def _pieces(self, rows: np.ndarray) -> Iterator[Any]:
        size = min(self._rows_a_read, len(rows))
        stream = self._features.stream(
            self.names, rows=rows, batch_size=size, dtype="float32", prefetch_bytes=2 * _READ_BYTES
        )
        with iter(stream) as batches:
            yield from batches

    def _normed(self, name: str, tokens_btd: np.ndarray) -> np.ndarray:
        if self._norm is None or not name.startswith("block:"):
            return tokens_btd
        return self._norm.apply(torch.from_numpy(tokens_btd)).numpy()

    def _drawn(self, tokens_btd: np.ndarray, valid: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Give some tokens of each image: those at places that only seed and row decide."""
        found = []
        for tokens_td, is_valid, row in zip(tokens_btd, valid, rows, strict=True):
            places = np.flatnonzero(is_valid)
            draw = np.random.default_rng([self._seed, int(row)])
            found.append(tokens_td[draw.permutation(places)[:TOKENS_AN_IMAGE]])
        return np.concatenate(found)


def _pooled(tokens_btd: np.ndarray, valid: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Give the mean of the tokens of each image; those of padding may hold anything."""
    filled_btd = np.where(valid[:, :, None], tokens_btd, np.float32(0))
    return filled_btd.sum(axis=1, dtype=np.float64) / valid.sum(axis=1, keepdims=True)


def _refuse_constant(matrix: np.ndarray, names: Sequence[str]) -> None:
    for name, value in zip(names, matrix.diagonal(), strict=True):
        if np.isnan(value):
            hint = "Leave it out by naming the others with --tap."
            raise invalid("tap", name, "one that differs between samples", hint=hint)


def _proposal(
    features: FeatureSet, names: Sequence[str], matrix: np.ndarray, kp: int
) -> Proposal | None:
    """Propose from blocks or stages alone: the final norm is the last block again."""
    kept = [place for place, name in enumerate(names) if name != "norm"]
    if len(kept) < MIN_TAPS:
        return None
    depth = features.backbone.get("depth")
    return propose(
        [names[place] for place in kept],
        matrix[np.ix_(kept, kept)],
        kp=kp,
        depth=None if depth is None else int(depth),
    )

"""CKA of the layers: against a direct form in float64, streamed, drawn."""

from __future__ import annotations

import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

import featstore
from cli.common import exit_code
from cli.featstore_app import featstore as app
from featstore.errors import InvalidInputError, NotFoundError
from featstore.select import select_rows
from heads.charts import heatmap_png
from heads.cka import MIN_BATCH, TOKENS_AN_IMAGE, MinibatchCka, layer_cka
from tests.fakes import SHAPES, FakeReader, fake_extract

N_IMAGES = 22
BLOCKS = ("block:0", "block:2", "block:5")


def direct_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The debiased HSIC, term by term as it is printed in Nguyen et al. 2021, equation 3."""
    n = len(x)
    k, m = (z.astype(np.float64) @ z.astype(np.float64).T for z in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    ones = np.ones(n)
    total = np.trace(k @ m)
    total += (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    total -= 2 / (n - 2) * (ones @ k @ m @ ones)
    return float(total / (n * (n - 3)))


def direct_cka(batches: list[list[np.ndarray]]) -> np.ndarray:
    """CKA of every two taps from the mean HSIC of some mini-batches, each a list of taps."""
    n_taps = len(batches[0])
    hsic = np.zeros((n_taps, n_taps))
    for taps in batches:
        for i in range(n_taps):
            for j in range(n_taps):
                hsic[i, j] += direct_hsic(taps[i], taps[j]) / len(batches)
    return hsic / np.sqrt(np.outer(hsic.diagonal(), hsic.diagonal()))


def estimated(batches: list[list[np.ndarray]]) -> np.ndarray:
    estimate = MinibatchCka(len(batches[0]))
    for batch in batches:
        estimate.add(batch)
    return estimate.matrix()


def related(n: int, seed: int = 0) -> list[np.ndarray]:
    """Three taps of other widths: two alike, one that shares little with them; far from zero."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((n, 6)) * [4, 3, 2, 1, 1, 1]
    taps = []
    for dim, noise in ((8, 0.5), (12, 1.0), (20, 6.0)):
        # The mixing is that of the tap, whichever the samples.
        mix = np.random.default_rng(dim).standard_normal((6, dim))
        taps.append(shared @ mix + noise * random.standard_normal((n, dim)) + 30)
    return taps


def cut(taps: list[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [[tap[at : at + size] for tap in taps] for at in range(0, len(taps[0]), size)]


def test_one_batch_of_all_samples_is_the_direct_form():
    taps = related(40)
    np.testing.assert_allclose(estimated([taps]), direct_cka([taps]), atol=1e-10)


def test_mini_batches_are_the_direct_mean_and_near_that_of_all_samples():
    taps = related(512)
    batches = cut(taps, 64)
    found = estimated(batches)
    np.testing.assert_allclose(found, direct_cka(batches), atol=1e-10)
    np.testing.assert_allclose(found, direct_cka([taps]), atol=0.05)
    assert found[0, 1] > 0.85 > 0.6 > found[0, 2]


def test_unrelated_features_are_unlike_however_few_the_samples():
    random = np.random.default_rng(0)
    batches = [[random.standard_normal((16, 100)) for _ in range(2)] for _ in range(50)]
    assert abs(estimated(batches)[0, 1]) < 0.02


def test_a_turn_a_scale_and_a_shift_change_nothing():
    (tap, *_) = related(30)
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))
    found = estimated([[tap, 7 * tap @ turn + 1000, tap.astype(np.float32)]])
    np.testing.assert_allclose(found, 1.0, atol=1e-6)


def test_what_it_holds_does_not_grow_with_the_samples():
    def peak(n_batches: int) -> int:
        estimate = MinibatchCka(3)
        tracemalloc.start()
        for number in range(n_batches):
            estimate.add(related(32, seed=number))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert estimate.n_samples == 32 * n_batches
        return held

    peak(1)  # what is made once, the first time
    assert peak(200) < 1.2 * peak(5)


def test_too_few_samples_are_refused():
    with pytest.raises(InvalidInputError, match="at least 4"):
        MinibatchCka(2).add([np.zeros((3, 5))] * 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A ViT with random weights on a few rooms, padded above and below."""
    path = tmp_path_factory.mktemp("cka") / "s.zarr"
    featstore.extract(
        path,
        backbone="test_vit",
        weights="random",
        data=[f"rooms:n={N_IMAGES},seed=0"],
        taps=[*BLOCKS, "norm", "norm.mean"],
        image_size=(64, 64),
        resize="letterbox",
    )
    return path


@pytest.fixture(scope="module")
def tokens(store):
    """Tap to (images, tokens on the image, dim), float64, read as they lie in the store."""
    features = featstore.open(store).feature_set()
    rows = select_rows(features.folder, BLOCKS)
    boxes = {place.dst for place in features.placements(rows).values()}
    ((left, top, right, bottom),) = boxes
    assert (left, right) == (0, 64)
    assert top >= 8  # so that the first row of tokens is padding
    centres = np.arange(4) * 16 + 8
    is_seen = (centres >= top) & (centres < bottom)
    assert not is_seen.all()
    found = {}
    for tap in (*BLOCKS, "norm"):
        values = features.read(tap, rows).astype(np.float64)
        found[tap] = values.reshape(len(rows), 4, 4, -1)[:, is_seen].reshape(
            len(rows), -1, values.shape[-1]
        )
    return found


def test_images_of_a_store_are_the_direct_form(store, tokens):
    found = layer_cka(store)
    assert found.taps == (*BLOCKS, "norm")
    assert (found.n_images, found.n_samples, found.n_batches) == (N_IMAGES, N_IMAGES, 1)
    direct = direct_cka([[tokens[tap].mean(axis=1) for tap in found.taps]])
    np.testing.assert_allclose(found.matrix, direct, atol=1e-6)
    assert direct.min() < 0.99


def test_tokens_of_a_store_are_the_direct_form(store, tokens):
    found = layer_cka(store, samples="tokens", batch_size=10_000)
    n_seen = tokens["norm"].shape[1]
    assert n_seen < TOKENS_AN_IMAGE
    assert found.n_samples == N_IMAGES * n_seen
    direct = direct_cka([[np.concatenate(list(tokens[tap])) for tap in found.taps]])
    np.testing.assert_allclose(found.matrix, direct, atol=1e-6)


def test_some_tokens_of_each_image_are_the_same_ones_in_every_tap(store, tokens, monkeypatch):
    batches = []
    monkeypatch.setattr("heads.cka.TOKENS_AN_IMAGE", 5)
    monkeypatch.setattr(MinibatchCka, "add", lambda self, samples: batches.append(samples))
    monkeypatch.setattr(MinibatchCka, "matrix", lambda self: np.ones((2, 2)))
    layer_cka(store, samples="tokens", taps=["block:0", "block:2"], batch_size=50)
    assert [len(first) for first, _ in batches] == [40, 35, 35]
    known = [tokens[tap].reshape(-1, 64) for tap in ("block:0", "block:2")]
    places = []
    for samples in batches:
        for first, second in zip(*samples, strict=True):
            (place,) = np.flatnonzero((known[0] == first).all(axis=1))
            np.testing.assert_array_equal(known[1][place], second)
            places.append(place)
    n_seen = tokens["block:0"].shape[1]
    images, counts = np.unique(np.array(places) // n_seen, return_counts=True)
    assert (len(images), set(counts), len(set(places))) == (N_IMAGES, {5}, 5 * N_IMAGES)


def test_the_final_norm_is_applied_to_blocks_alone(store, tokens):
    found = layer_cka(store, tap_norm="final")
    norm = featstore.open(store).feature_set().final_norm()

    def normed(tap, x):
        if tap == "norm":
            return x
        centred = x - x.mean(axis=-1, keepdims=True)
        unit = centred / np.sqrt(x.var(axis=-1, keepdims=True) + norm.eps)
        return unit * norm.weight + norm.bias

    direct = direct_cka([[normed(tap, tokens[tap]).mean(axis=1) for tap in found.taps]])
    np.testing.assert_allclose(found.matrix, direct, atol=1e-6)
    assert found.matrix[2][3] > 0.9999  # the last block, normed, is the tap `norm`


def test_mini_batches_of_a_store_hold_every_image_once_and_no_more_than_asked(store, monkeypatch):
    sizes = []
    seen = []
    original = MinibatchCka.add

    def add(self, samples):
        sizes.append(len(samples[0]))
        seen.append(samples[0])
        original(self, samples)

    monkeypatch.setattr(MinibatchCka, "add", add)
    found = layer_cka(store, batch_size=MIN_BATCH)
    assert sizes == [8, 7, 7]
    assert found.n_batches == 3
    assert len(np.unique(np.concatenate(seen), axis=0)) == N_IMAGES
    layer_cka(store, batch_size=MIN_BATCH, seed=1)
    assert not np.array_equal(seen[0], seen[3])  # the seed mixes


def test_rows_and_taps_can_be_chosen(store):
    found = layer_cka(store, taps=["block:-1", "block:0"], where="split = 'train'")
    assert found.taps == ("block:0", "block:5")  # from first to last
    assert found.n_images < N_IMAGES
    assert found.proposal is None


def test_stages_are_compared_by_images_and_not_by_tokens(tmp_path):
    path = tmp_path / "s.zarr"
    options = {"weights": "random", "data": ["rooms:n=4,seed=0"], "image_size": (64, 64)}
    featstore.extract(path, backbone="test_convnext", **options)
    found = layer_cka(path)
    assert found.taps == tuple(f"stage:{number}" for number in range(4))
    assert found.proposal.kt is None
    with pytest.raises(InvalidInputError, match=r"of one grid.*--samples images"):
        layer_cka(path, samples="tokens")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"taps": ["norm"]}, "at least 2 dense taps"),
        ({"taps": ["norm.mean", "norm"]}, "pooled"),
        ({"samples": "pixels"}, "images, tokens"),
        ({"tap_norm": "first"}, "final, none"),
        ({"batch_size": 7}, "at least 8"),
        ({"where": "row < 3"}, "at least 4"),
    ],
)
def test_what_cannot_be_compared_is_refused(store, options, match):
    with pytest.raises(InvalidInputError, match=match):
        layer_cka(store, **options)


def test_a_tap_that_is_not_stored_is_named_with_the_command_that_adds_it(store):
    with pytest.raises(NotFoundError, match=r"featstore extract .*--taps block:1"):
        layer_cka(store, taps=["block:0", "block:1"])


def test_a_tap_that_is_the_same_for_all_images_is_refused(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(20)], shapes=SHAPES[:2], scale={"block:0": 0.0})
    with pytest.raises(InvalidInputError, match=r"`tap` must be one that differs.*block:0"):
        layer_cka(path)


def test_the_command_prints_a_table_and_draws_it(store, tmp_path, capsys):
    out = tmp_path / "cka.png"
    assert exit_code(app, ["cka", "--store", str(store), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["CKA", *BLOCKS, "norm"]
    assert "1.00" in printed.splitlines()[2]
    assert "Extractor: block:0" in printed
    assert "Kt = " in printed
    with Image.open(out) as picture:
        assert min(picture.size) > 400


def test_the_command_prints_json_numbers(store, capsys):
    assert exit_code(app, ["cka", "--store", str(store), "--kp", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["taps"] == [*BLOCKS, "norm"]
    assert np.array(found["matrix"]).shape == (4, 4)
    assert len(found["proposal"]["taps"]) == 2
    assert found["path"] is None


def test_equal_matrices_give_equal_pictures_that_show_number_and_cut():
    matrix, names = np.array([[1, 0.2], [0.2, 1]]).tolist(), ["block:0", "block:1"]

    def drawn(values, cut):
        return heatmap_png(values, names, title="t", note="n", cut=cut)

    assert drawn(matrix, 1) == drawn(matrix, 1)
    other = np.array([[1, 0.9], [0.9, 1]]).tolist()
    pictures = [
        np.asarray(Image.open(io.BytesIO(each)))
        for each in (drawn(matrix, 0), drawn(matrix, 1), drawn(other, 0))
    ]
    assert len({each.shape for each in pictures}) == 1
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("n_taps", [3, 13])
def test_no_name_below_the_map_is_cut_off(n_taps):
    names = [f"block:{number}" for number in range(n_taps)]
    note = "300 images, mean token of each image, as stored: 300 samples in 2 mini-batches."
    png = heatmap_png(np.eye(n_taps).tolist(), names, title="CKA of the layers", note=note, cut=1)
    with Image.open(io.BytesIO(png)) as picture:
        edge = np.asarray(picture.convert("L"))[-2:]
    assert edge.min() == 255

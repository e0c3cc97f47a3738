"""Features as colours: what a colour means, and the page that shows them."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest

from cli.common import exit_code
from cli.featstore_app import featstore
from featstore.errors import InvalidInputError, NotFoundError
from featstore.images import decode, encode_png
from heads.feature_page import write_feature_page
from heads.token_colours import pca_colours
from tests.fakes import FakeReader, fake_extract, fake_plan


@pytest.fixture
def tokens():
    """Three strong directions in 6 dimensions, and hardly anything else."""
    random = np.random.default_rng(0)
    strong = random.standard_normal((4, 50, 3)) * [9, 5, 3]
    turned, _ = np.linalg.qr(random.standard_normal((6, 6)))
    noise = 0.01 * random.standard_normal((4, 50, 6))
    return (strong @ turned[:, :3].T + noise + 100).astype(np.float32)


def test_three_strong_directions_become_the_three_colours(tokens):
    found = pca_colours(tokens)
    assert found.share > 0.999
    flat = tokens.reshape(200, 6).astype(np.float64)
    flat -= flat.mean(axis=0)
    left, _, _ = np.linalg.svd(flat, full_matrices=False)
    for channel in range(3):
        colour = found.colours[:, :, channel].reshape(-1).astype(float)
        assert abs(np.corrcoef(colour, left[:, channel])[0, 1]) > 0.98


def test_colours_use_their_whole_range_and_all_tokens_are_opaque(tokens):
    colours = pca_colours(tokens).colours
    assert colours.shape == (4, 50, 4)
    assert (colours[:, :, :3].min(), colours[:, :, :3].max()) == (0, 255)
    assert (colours[:, :, 3] == 255).all()


def test_equal_tokens_have_equal_colours_in_every_image(tokens):
    tokens[1] = tokens[0][::-1]
    colours = pca_colours(tokens).colours
    np.testing.assert_array_equal(colours[1], colours[0][::-1])


def test_the_sign_does_not_depend_on_the_order_of_the_images(tokens):
    colours = pca_colours(tokens).colours.astype(int)
    again = pca_colours(tokens[::-1]).colours[::-1].astype(int)
    assert np.abs(colours - again).max() <= 1


def test_padding_decides_nothing_and_is_transparent(tokens):
    valid = np.ones((4, 50), dtype=bool)
    valid[:, 40:] = False
    damaged = tokens.copy()
    damaged[:, 40:] = np.nan
    colours = pca_colours(damaged, valid).colours
    np.testing.assert_array_equal(colours[:, :40], pca_colours(tokens[:, :40]).colours)
    assert (colours[:, 40:, 3] == 0).all()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_narrow_and_constant_tokens_have_colours_too(dim):
    narrow = np.random.default_rng(0).standard_normal((2, 9, dim))
    assert pca_colours(narrow).share == pytest.approx(1.0)
    constant = pca_colours(np.ones((2, 9, dim)))
    assert constant.share == 0.0
    assert np.ptp(constant.colours[:, :, :3].astype(int), axis=(0, 1)).max() == 0


@pytest.mark.parametrize("wrong", [np.full((1, 4, 3), np.nan), np.ones((1, 1, 3))])
def test_what_cannot_be_painted_is_refused(wrong):
    with pytest.raises(InvalidInputError, match="at least two tokens of finite numbers"):
        pca_colours(wrong)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_png_keeps_every_colour(channels):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, channels), dtype=np.uint8)
    pixels[:, :, 3:] = 255
    np.testing.assert_array_equal(decode(encode_png(pixels)), pixels[:, :, :3])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("colours") / "features.zarr"
    fake_extract(path, [FakeReader(20)])
    return path


def pngs(path):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', path.read_text())
    return [decode(base64.b64decode(data)) for data in found]


def test_the_page_shows_each_dense_tap_of_each_image(store, tmp_path):
    out = tmp_path / "features.html"
    report = write_feature_page(store, out, n_images=3)
    assert report.taps == ("block:0", "norm")
    assert report.rows == (0, 6, 13)
    assert all(0 < share <= 1 for share in report.shares.values())
    text = out.read_text()
    assert text.count("<figcaption>") == 3
    assert "http" not in re.sub(r'src="[^"]*"', "", text)
    assert sum(image.shape[:2] == (4, 4) for image in pngs(out)) == 6


def test_taps_rows_and_their_number_are_the_users_choice(store, tmp_path):
    out = tmp_path / "f.html"
    report = write_feature_page(store, out, taps=["norm"], where="split = 'test'", n_images=99)
    assert report.taps == ("norm",)
    assert len(report.rows) == 4


def test_only_what_lies_on_the_image_is_shown(tmp_path):
    plan = fake_plan(resize="letterbox")
    fake_extract(tmp_path / "s.zarr", [FakeReader(6, source_hw=(16, 32))], plan=plan)
    write_feature_page(tmp_path / "s.zarr", tmp_path / "f.html", taps=["norm"], n_images=2)
    # Of 4 x 4 tokens, two lines of them saw the flat image.
    assert sum(image.shape[:2] == (2, 4) for image in pngs(tmp_path / "f.html")) == 2


def test_what_is_not_there_or_pooled_is_refused(store, tmp_path):
    out = tmp_path / "f.html"
    with pytest.raises(NotFoundError, match="block:0"):
        write_feature_page(store, out, taps=["block:9"])
    with pytest.raises(InvalidInputError, match="this one is pooled"):
        write_feature_page(store, out, taps=["norm.mean"])
    with pytest.raises(NotFoundError, match="No stored row"):
        write_feature_page(store, out, where="split = 'none'")
    with pytest.raises(InvalidInputError, match="at least 1"):
        write_feature_page(store, out, n_images=0)
    assert not out.exists()


def test_the_command_writes_the_page_and_tells_where(store, tmp_path, capsys):
    out = tmp_path / "f.html"
    args = ["show", "fake@16", "--store", str(store), "--out", str(out), "--images", "2"]
    assert exit_code(featstore, args) == 0
    assert capsys.readouterr().out == f"Wrote {out}.\n"
    assert exit_code(featstore, [*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)

import ast
import contextlib
import io
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

from cli.forward import _drawn
from featstore.datasets.arrays import ArrayFile
from featstore.errors import BadImageError, InvalidInputError
from featstore.geometry import place
from featstore.hashing import image_key
from featstore.images import MAX_PIXELS, decode, decode_label, draw, probe, thumbnail
from featstore.sources import BackboneSource
from featstore.store import placement_columns
from featstore.types import Label
from tests.fakes import fake_plan


def encoded(image, kind="PNG", **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def npy(array):
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


@pytest.fixture
def photo():
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((80, 60), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"])
def test_probe_tells_the_size_that_decode_gives(photo, kind):
    data = encoded(photo, kind)
    assert probe(data) == decode(data).shape[:2] == (60, 80)
    assert decode(data).dtype == np.uint8


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photo, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo, kind, exif=exif)
    assert probe(data) == decode(data).shape[:2]
    plain = decode(encoded(photo, kind))
    straight = {1: plain, 3: plain[::-1, ::-1], 6: np.rot90(plain, -1), 8: np.rot90(plain)}
    if orientation in straight:
        np.testing.assert_array_equal(decode(data), straight[orientation])


def test_grey_becomes_three_equal_channels():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey))), np.stack([grey] * 3, -1))


def test_a_palette_shows_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decode(encoded(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_transparent_pixels_show_white():
    rgba = np.array([[[9, 9, 9, 0], [9, 9, 9, 255], [0, 0, 0, 128]]], np.uint8)
    expected = [[[255] * 3, [9] * 3, [127] * 3]]
    assert decode(encoded(Image.fromarray(rgba))).tolist() == expected
    assert decode(npy(rgba)).tolist() == expected


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = decode(encoded(image, "TIFF"))[0, 0]
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bits_keep_their_high_byte():
    wide = np.array([[0, 255, 256, 65535]], np.uint16)
    for data in (encoded(Image.fromarray(wide)), npy(wide)):
        assert decode(data)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_npy_bytes_are_an_image():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    assert probe(npy(pixels)) == (5, 7)
    np.testing.assert_array_equal(decode(npy(pixels)), pixels)
    np.testing.assert_array_equal(decode(npy(pixels / 255)), pixels)
    assert decode(npy(pixels[..., 0] > 99)).shape == (5, 7, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2), 1.5), "must lie in"),
        (np.full((2, 2), np.nan), "must lie in"),
        (np.full((2, 2), -1), "0 to 65535"),
        (np.zeros((3, 4, 5), np.uint8), r"\(H, W\)"),
        (np.zeros(4, np.uint8), r"\(H, W\)"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.array([["a"]]), "instead of numbers"),
    ],
)
def test_an_array_that_is_no_image_is_refused(array, message):
    with pytest.raises(BadImageError, match=message):
        decode(npy(array))


def test_zero_bytes_and_no_image_are_refused():
    for function in (probe, decode):
        with pytest.raises(BadImageError, match="0 bytes"):
            function(b"")
        with pytest.raises(BadImageError, match="no image of a known format"):
            function(b"hello, I am a text")
        with pytest.raises(BadImageError, match="header"):
            function(b"\x93NUMPY\x01\x00\x10")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_refused(photo, kind, part):
    data = encoded(photo, kind)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(BadImageError):
        decode(data[: int(len(data) * part)])


def test_a_truncated_npy_is_refused(photo):
    with pytest.raises(BadImageError, match="npy"):
        decode(npy(np.asarray(photo))[:-9])


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what is damaged
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_damaged_bytes_never_give_another_error(photo, kind):
    data = encoded(photo, kind)
    random = np.random.default_rng(7)
    for _ in range(150):
        damaged = bytearray(data)
        for position in random.integers(0, min(len(data), 400), 3):
            damaged[position] = random.integers(0, 256)
        for function in (probe, decode):
            with contextlib.suppress(BadImageError):
                assert function(bytes(damaged)) is not None


def test_an_absurdly_large_image_is_refused_before_it_is_decoded():
    side = 20_000
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    large_npy = npy(np.zeros((1, 1), np.uint8)).replace(b"(1, 1), }", b"(99999, 9999), }")
    assert side * side > MAX_PIXELS
    for data in (header + info, large_npy[:9999]):
        for function in (probe, decode):
            with pytest.raises(BadImageError, match="too large"):
                function(data)


def test_drawing_squashes_smoothly_and_flips():
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    plain = place(source_hw=(8, 64), crop=None, input_hw=(4, 8), resize="squash", view="plain")
    drawn = draw(stripes, plain, interpolation="bicubic", fill_rgb=(0, 0, 0))
    assert drawn.shape == (4, 8, 3)
    # An aliased resize would give 0 or 200.
    assert np.abs(drawn.astype(int) - 100).max() < 40
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (8, 64, 3)).copy()
    flipped = place(source_hw=(8, 64), crop=None, input_hw=(4, 8), resize="squash", view="hflip")
    one = draw(ramp, plain, interpolation="bilinear", fill_rgb=(0, 0, 0))
    two = draw(ramp, flipped, interpolation="bilinear", fill_rgb=(0, 0, 0))
    np.testing.assert_array_equal(one[:, ::-1], two)
    assert one[0, 0, 0] < one[0, -1, 0]


def test_padding_has_the_given_colour_and_the_image_is_where_the_placement_says():
    image = np.full((10, 20, 3), 200, np.uint8)
    box = place(source_hw=(10, 20), crop=None, input_hw=(20, 20), resize="letterbox", view="plain")
    drawn = draw(image, box, interpolation="bicubic", fill_rgb=(1, 2, 3))
    assert drawn[:5].reshape(-1, 3).tolist() == [[1, 2, 3]] * 100
    assert (drawn[5:15] == 200).all()


def test_a_crop_draws_only_its_region():
    image = np.zeros((10, 10, 3), np.uint8)
    image[2:6, 4:8] = 255
    box = place(
        source_hw=(10, 10), crop=(4, 2, 8, 6), input_hw=(8, 8), resize="squash", view="plain"
    )
    assert (draw(image, box, interpolation="box", fill_rgb=(0, 0, 0)) == 255).all()


def test_via_resizes_in_two_steps(photo):
    pixels = np.asarray(photo)
    box = place(source_hw=(60, 80), crop=None, input_hw=(28, 28), resize="via:8", view="plain")
    drawn = draw(pixels, box, interpolation="bilinear", fill_rgb=(0, 0, 0), via=8)
    small = photo.resize((8, 8), Image.Resampling.BILINEAR)
    expected = np.asarray(small.resize((28, 28), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(drawn, expected)
    assert (drawn != draw(pixels, box, interpolation="bilinear", fill_rgb=(0, 0, 0))).any()


@pytest.mark.parametrize("upscale", ["nearest", "bilinear", "bicubic"])
def test_a_basis_is_shrunk_by_one_filter_and_enlarged_by_another(photo, upscale):
    rule = f"crop+via:8:{upscale}"
    box = place(source_hw=(60, 80), crop=None, input_hw=(28, 28), resize=rule, view="hflip")
    drawn = draw(
        np.asarray(photo), box, interpolation="bicubic", fill_rgb=(0, 0, 0), via=8, upscale=upscale
    )
    small = photo.resize((8, 8), Image.Resampling.BICUBIC, box=(10, 0, 70, 60))
    expected = small.resize((28, 28), Image.Resampling[upscale.upper()])
    np.testing.assert_array_equal(drawn, np.asarray(expected)[:, ::-1])


@pytest.mark.parametrize("rule", ["squash", "via:8", "crop+via:8:nearest"])
def test_extraction_and_prediction_draw_by_the_rule_of_the_plan(photo, rule):
    plan = fake_plan(image_size=(28, 28), resize=rule, interpolation="bicubic")
    pixels, placement = _drawn(np.asarray(photo), None, plan)
    data = encoded(photo)
    reader = SimpleNamespace(read_image=lambda item: data)
    readers = SimpleNamespace(find=lambda dataset, path: (reader, None))
    line = {
        "dataset": "d",
        "path": "p",
        "image_key": image_key(data),
        **placement_columns(placement),
    }
    loaded = BackboneSource(readers, None, plan).load(line)
    np.testing.assert_array_equal(loaded.value, pixels)
    region = (0, 0, 80, 60) if rule != "crop+via:8:nearest" else (10, 0, 70, 60)
    expected = photo
    if rule != "squash":
        expected, region = photo.resize((8, 8), Image.Resampling.BICUBIC, box=region), None
    last = Image.Resampling.NEAREST if "nearest" in rule else Image.Resampling.BICUBIC
    np.testing.assert_array_equal(pixels, np.asarray(expected.resize((28, 28), last, box=region)))


def test_the_basis_of_a_letterbox_is_letterboxed_too(photo):
    rule = "letterbox+via:8:nearest"
    box = place(source_hw=(60, 80), crop=None, input_hw=(28, 28), resize=rule, view="plain")
    drawn = draw(
        np.asarray(photo),
        box,
        interpolation="bicubic",
        fill_rgb=(1, 2, 3),
        via=8,
        upscale="nearest",
    )
    small = photo.resize((8, 6), Image.Resampling.BICUBIC)
    expected = small.resize((28, 21), Image.Resampling.NEAREST)
    y0 = box.dst[1]
    np.testing.assert_array_equal(drawn[y0 : y0 + 21], np.asarray(expected))
    assert (drawn[:y0] == (1, 2, 3)).all()


def test_an_unknown_interpolation_and_a_wrong_size_are_refused(photo):
    box = place(source_hw=(60, 80), crop=None, input_hw=(8, 8), resize="squash", view="plain")
    with pytest.raises(InvalidInputError, match="bicubic"):
        draw(np.asarray(photo), box, interpolation="cubic", fill_rgb=(0, 0, 0))
    with pytest.raises(InvalidInputError, match="bicubic"):
        draw(
            np.asarray(photo),
            box,
            interpolation="bicubic",
            fill_rgb=(0, 0, 0),
            via=4,
            upscale="cubic",
        )
    with pytest.raises(InvalidInputError, match="of size"):
        draw(np.asarray(photo)[:-1], box, interpolation="bicubic", fill_rgb=(0, 0, 0))


def test_a_thumbnail_has_the_long_side_and_never_enlarges():
    wide = np.zeros((100, 640, 3), np.uint8)
    assert probe(thumbnail(wide)) == (50, 320)
    assert probe(thumbnail(wide[:20, :30])) == (20, 30)
    assert probe(thumbnail(np.zeros((1, 999, 3), np.uint8))) == (1, 320)


def test_a_depth_label_gives_metres_and_where_there_are_some():
    millimetres = np.array([[0, 1500], [3000, 65535]], np.uint16)
    data = encoded(Image.fromarray(millimetres))
    label = Label(kind="depth", encoding="png", data=data, scale=0.001, invalid=0.0)
    values, valid = decode_label(label)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, millimetres / 1000, rtol=1e-6)
    np.testing.assert_array_equal(valid, millimetres > 0)


def test_a_palette_label_gives_its_indices_as_integers():
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0] * 256)
    image.putdata([0, 7, 255])
    label = Label(kind="classes", encoding="png", data=encoded(image), invalid=255.0)
    values, valid = decode_label(label)
    assert values.dtype == np.int32
    assert values.tolist() == [[0, 7, 255]]
    assert valid.tolist() == [[True, True, False]]


def test_an_npy_label_keeps_its_numbers_and_nan_is_no_value():
    depth = np.array([[1.25, np.nan]], np.float32)
    values, valid = decode_label(Label(kind="depth", encoding="npy", data=npy(depth)))
    assert values[0, 0] == 1.25
    assert valid.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("encoding", "data", "message"),
    [
        ("png", encoded(Image.new("RGB", (2, 2))), "one number a pixel"),
        ("npy", npy(np.zeros((2, 2, 1))), "one number a pixel"),
        ("npy", npy(np.full((2, 2), 2**40)), "fit 32 bits"),
        ("png", b"", "0 bytes"),
        ("npy", b"\x93NUMPY", "npy"),
    ],
)
def test_a_label_that_is_no_map_is_refused(encoding, data, message):
    with pytest.raises(BadImageError, match=message):
        decode_label(Label(kind="classes", encoding=encoding, data=data))


def test_an_unknown_label_encoding_is_refused():
    with pytest.raises(InvalidInputError, match="png or npy"):
        decode_label(Label(kind="depth", encoding="exr", data=b""))


@pytest.mark.parametrize("kind", ["label", "features"])
def test_one_thread_at_a_time_parses_the_header_of_an_npy(kind, monkeypatch, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 3), np.float32))
    label = Label(kind="depth", encoding="npy", data=path.read_bytes())
    features = ArrayFile(path, None)
    literal_eval, parsing, found = ast.literal_eval, threading.Lock(), []

    def slow(text):
        found.append(parsing.acquire(blocking=False))
        time.sleep(0.002)
        try:
            return literal_eval(text)
        finally:
            if found[-1]:
                parsing.release()

    monkeypatch.setattr(ast, "literal_eval", slow)
    read = {"label": lambda _: decode_label(label), "features": features.read}[kind]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, [0] * 12))
    assert found == [True] * 12

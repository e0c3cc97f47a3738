import numpy as np
import pytest

from featstore.errors import BadImageError, InvalidInputError
from featstore.geometry import place, resize_masked, sample_nearest, to_source_map


def placed(source_hw, input_hw, resize="squash", *, crop=None, view="plain"):
    return place(source_hw=source_hw, crop=crop, input_hw=input_hw, resize=resize, view=view)


def test_padding_512_to_518_leaves_three_pixels_on_each_side():
    assert placed((512, 512), (518, 518), "pad").dst == (3, 3, 515, 515)


def test_letterbox_centres_a_wide_image():
    placement = placed((240, 320), (224, 224), "letterbox")
    assert placement.dst == (0, 28, 224, 196)
    assert placement.box == (0.0, 0.0, 320.0, 240.0)


def test_a_crop_box_that_hangs_over_is_cut_to_the_image():
    assert placed((10, 20), (8, 8), crop=(-5, 2, 30, 8)).box == (0.0, 2.0, 20.0, 8.0)


def test_a_crop_box_outside_of_the_image_is_refused():
    with pytest.raises(BadImageError, match="overlaps the 10x20 image"):
        placed((10, 20), (8, 8), crop=(25, 0, 30, 5))


@pytest.mark.parametrize(
    "rule",
    [
        "stretch",
        "via:",
        "via:0",
        "via:x",
        "via:8:cubic",
        "via:8:",
        "crop+",
        "crop+crop",
        "pad+via:8",
        "crop+via:08",
        "crop+squash+via:8",
    ],
)
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(InvalidInputError, match="resize"):
        placed((10, 20), (8, 8), rule)


@pytest.mark.parametrize("kind", ["squash", "crop", "letterbox"])
@pytest.mark.parametrize("basis", ["via:5", "via:5:nearest", "via:5:bilinear"])
def test_a_basis_changes_no_placement(kind, basis):
    sizes = ((48, 64), (28, 28)), ((64, 30), (14, 42))
    for source_hw, input_hw in sizes:
        plain = placed(source_hw, input_hw, kind)
        assert placed(source_hw, input_hw, f"{kind}+{basis}") == plain
    assert placed((48, 64), (28, 28), basis) == placed((48, 64), (28, 28))


def test_an_unknown_view_is_refused():
    with pytest.raises(InvalidInputError, match="plain, hflip"):
        placed((10, 20), (8, 8), view="vflip")


def test_halving_takes_the_mean_of_the_valid_pixels_of_each_cell():
    values = np.array([[1.0, 3.0, 9.0, np.nan], [5.0, 7.0, np.nan, np.nan]])
    means, valid = resize_masked(values, np.isfinite(values), placed((2, 4), (2, 4)), (1, 2))
    np.testing.assert_array_equal(means, [[4.0, 9.0]])
    assert valid.all()


def test_a_cell_without_a_valid_pixel_has_no_value():
    values = np.ones((2, 4))
    valid_hw = np.array([[True, True, False, False]] * 2)
    _, valid = resize_masked(values, valid_hw, placed((2, 4), (2, 4)), (1, 2))
    np.testing.assert_array_equal(valid, [[True, False]])


def test_nearest_takes_the_pixel_under_the_centre():
    values = np.arange(16).reshape(4, 4)
    shown, covered = sample_nearest(values, placed((4, 4), (4, 4)), (2, 2))
    np.testing.assert_array_equal(shown, [[5, 7], [13, 15]])
    assert covered.all()


def test_a_ramp_comes_back_as_the_same_ramp():
    """The half-pixel convention: the centre of cell i lies at (i + 0.5) cells."""
    centres = (np.arange(8) + 0.5) * 4
    ramp = np.broadcast_to(centres, (1, 8, 8)).astype(np.float32)
    values, covered = to_source_map(ramp, placed((16, 32), (64, 32)))
    np.testing.assert_allclose(values[0, 5, 2:-2], np.arange(2, 30) + 0.5, rtol=1e-6)
    assert covered.all()


def test_a_flipped_prediction_is_mirrored_back():
    output = np.array([[[1.0, 2.0, 3.0, 4.0]]], dtype=np.float32)
    values, _ = to_source_map(output, placed((1, 4), (1, 4), view="hflip"))
    np.testing.assert_array_equal(values[0], [[4.0, 3.0, 2.0, 1.0]])


def test_what_a_crop_left_out_is_nan_and_not_covered():
    placement = placed((4, 8), (4, 4), "crop")
    values, covered = to_source_map(np.ones((2, 2, 2), np.float32), placement, mode="nearest")
    np.testing.assert_array_equal(covered[0], [False] * 2 + [True] * 4 + [False] * 2)
    np.testing.assert_array_equal(np.isnan(values[1]), ~covered)


@pytest.mark.parametrize("function", [sample_nearest, resize_masked])
def test_a_map_of_another_size_is_refused(function):
    masks = [np.ones((4, 5), bool)] * (2 if function is resize_masked else 1)
    with pytest.raises(InvalidInputError, match="of the image's size"):
        function(*masks, placed((4, 4), (4, 4)), (2, 2))


def test_a_prediction_of_integers_or_an_unknown_mode_is_refused():
    placement = placed((4, 4), (4, 4))
    with pytest.raises(InvalidInputError, match="floating point array"):
        to_source_map(np.ones((1, 2, 2), np.int64), placement)
    with pytest.raises(InvalidInputError, match="bilinear or nearest"):
        to_source_map(np.ones((1, 2, 2), np.float32), placement, mode="cubic")

from __future__ import annotations

import numpy as np
import pytest

from featstore.errors import InvalidInputError
from featstore.images import decode
from heads.pictures import comparison_png, prediction_png


@pytest.fixture
def scene():
    rows, columns = np.mgrid[0:48, 0:64].astype(np.float32)
    truth = 1 + rows / 24
    image = np.stack([4 * columns, 5 * rows, 0 * rows], axis=-1).astype(np.uint8)
    return image, truth, truth + np.where(columns < 32, 0.5, -0.5).astype(np.float32)


def panels(png):
    """Pixels of the first row of panels, from the rendered picture."""
    return decode(png).astype(int)


def draw(image, prediction, truth):
    return comparison_png(
        title="rooms/1.png", image_hwc=image, prediction_hw=prediction, truth_hw=truth, unit="m"
    )


def test_a_comparison_is_four_panels_wide(scene):
    image, truth, prediction = scene
    height, width, _ = panels(draw(image, prediction, truth)).shape
    assert 4 < width / height < 6  # four panels of 4:3, two scale bars, a title


def test_an_error_is_red_where_too_far_and_blue_where_too_near(scene):
    image, truth, prediction = scene
    pixels = panels(draw(image, prediction, truth))
    right = pixels[:, int(0.72 * pixels.shape[1]) :]
    is_red = (right[..., 0] > 90) & (right[..., 1:].max(axis=-1) < 60)
    is_blue = (right[..., 2] > 80) & (right[..., 0] < 30) & (right[..., 1] < 80)
    assert is_red.sum() > 1000
    assert is_blue.sum() > 1000
    assert np.nonzero(is_red)[1].mean() < np.nonzero(is_blue)[1].mean()


def test_prediction_and_truth_share_their_colours(scene):
    image, truth, _ = scene
    pixels = panels(draw(image, truth, truth))
    middle = pixels[pixels.shape[0] // 2]
    is_same = [
        (abs(middle[int(0.24 * len(middle)) + step] - middle[int(0.47 * len(middle)) + step])).max()
        for step in range(0, 200, 20)
    ]
    assert max(is_same) <= 2


def test_pixels_without_truth_are_grey(scene):
    image, truth, prediction = scene
    truth = truth.copy()
    truth[10:30, 10:40] = np.nan
    pixels = panels(draw(image, prediction, truth))
    is_grey = (pixels == round(0.82 * 255)).all(axis=-1)
    assert is_grey.sum() > 2 * 2000  # in the truth and in the error


def test_equal_pictures_are_equal_files(scene):
    assert draw(*scene) == draw(*scene)


@pytest.mark.parametrize("value", [np.nan, 2.0, 0.0])
def test_a_flat_or_empty_map_is_drawn_without_a_warning(scene, value):
    image, truth, _ = scene
    png = prediction_png(
        title="x", image_hwc=image, prediction_hw=np.full_like(truth, value), unit="m"
    )
    assert panels(png).shape[0] > 100


def test_an_image_of_another_resolution_fills_its_panel(scene):
    image, truth, prediction = scene
    large = panels(draw(np.repeat(image, 2, axis=0), prediction, truth))
    assert large.shape == panels(draw(image, prediction, truth)).shape


def test_maps_of_different_sizes_are_refused(scene):
    image, truth, prediction = scene
    with pytest.raises(InvalidInputError, match="truth's size"):
        draw(image, prediction[:-1], truth)

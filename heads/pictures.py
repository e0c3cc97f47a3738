"""Pictures of predictions, drawn with matplotlib and without a display; figures: `charts.py`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from featstore.errors import invalid

VALUES_COLOURS = "viridis"
ERROR_COLOURS = "RdBu_r"
NO_VALUE = "0.82"  # light grey
_PANEL_HEIGHT = 2.6  # inches
_DPI = 110
_TITLE_HEIGHT = 0.75  # inches, for the line above and the names of the panels
_LEGEND_HEIGHT = 0.45  # inches, of two lines
_BAR_WIDTH = 0.8  # inches, with its numbers
_MAX_NAMED, _NAMES_A_LINE = 12, 6  # colours of a legend
_MAX_SIDE = 640  # pixels of a panel; more would not be seen


def comparison_png(
    *,
    title: str,
    image_hwc: np.ndarray | None,
    prediction_hw: np.ndarray,
    truth_hw: np.ndarray,
    unit: str,
) -> bytes:
    """Draw input, prediction, truth and error side by side.

    Prediction and truth share one colour scale that shows both; the error is prediction minus
    truth, on a scale that is symmetric around zero. Pixels without a value are grey.

    Args:
        title: A line above the panels.
        image_hwc: (h, w, 3) uint8, at any resolution; None where the image is not at hand.
        prediction_hw: (H, W); NaN where there is none.
        truth_hw: (H, W); NaN where there is none.
        unit: Of the numbers, such as "m".

    Returns:
        A PNG file.

    Raises:
        InvalidInputError: Prediction and truth differ in size.
    """
    if prediction_hw.shape != truth_hw.shape:
        raise invalid("prediction_hw", prediction_hw.shape, f"of the truth's size {truth_hw.shape}")
    low, high = _limits(np.stack([prediction_hw, truth_hw]))
    error_hw = prediction_hw - truth_hw
    reach = _reach(error_hw)
    aspect = prediction_hw.shape[1] / prediction_hw.shape[0]
    with _figure(4, aspect, n_bars=2) as figure:
        panels = figure.subplots(1, 4)
        figure.suptitle(title)
        _show_input(panels[0], image_hwc, aspect)
        for panel, name, values in (
            (panels[1], "prediction", prediction_hw),
            (panels[2], "truth", truth_hw),
        ):
            shown = _show(panel, name, _thin(values), limits=(low, high))
        _bar(figure, shown, panels[2], unit)
        root_mean_square = float(np.sqrt(np.nanmean(np.square(error_hw))))
        shown = _show(
            panels[3],
            f"error (rms {root_mean_square:.2f} {unit})",
            _thin(error_hw),
            limits=(-reach, reach),
            colours=ERROR_COLOURS,
        )
        _bar(figure, shown, panels[3], unit)
        return _png(figure)


def prediction_png(
    *, title: str, image_hwc: np.ndarray, prediction_hw: np.ndarray, unit: str
) -> bytes:
    """Draw an image and its prediction side by side, with a scale bar.

    Args:
        title: A line above the panels.
        image_hwc: (h, w, 3) uint8.
        prediction_hw: (H, W); NaN where there is none.
        unit: Of the numbers, such as "m".

    Returns:
        A PNG file.
    """
    aspect = prediction_hw.shape[1] / prediction_hw.shape[0]
    with _figure(2, aspect, n_bars=1) as figure:
        panels = figure.subplots(1, 2)
        figure.suptitle(title)
        _show_input(panels[0], image_hwc, aspect)
        limits = _limits(prediction_hw)
        shown = _show(panels[1], "prediction", _thin(prediction_hw), limits=limits)
        _bar(figure, shown, panels[1], unit)
        return _png(figure)


def panels_png(
    *,
    title: str,
    panels: Mapping[str, np.ndarray | None],
    legend: Mapping[str, tuple[int, int, int]] | None = None,
) -> bytes:
    """Draw pictures that are painted already side by side, under their names.

    Args:
        title: A line above the panels.
        panels: Name to (H, W, 3) uint8, the last one giving the shape of all; None is left blank.
        legend: Names of colours (red, green, blue, each to 255), shown below; the first twelve.

    Returns:
        A PNG file.
    """
    last = next(image for image in reversed(list(panels.values())) if image is not None)
    aspect = last.shape[1] / last.shape[0]
    with _figure(len(panels), aspect, n_bars=0, has_legend=bool(legend)) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        figure.suptitle(title)
        for panel, (name, image) in zip(axes, panels.items(), strict=True):
            _show_input(panel, image, aspect, name=name)
        if legend:
            _name_colours(figure, legend)
        return _png(figure)


def _name_colours(figure: Figure, legend: Mapping[str, tuple[int, int, int]]) -> None:
    shown = dict(list(legend.items())[:_MAX_NAMED])
    patches = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), label=name)
        for name, (red, green, blue) in shown.items()
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(len(patches), _NAMES_A_LINE),
        frameon=False,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Give the range of colours: nearly all of the values, so that one odd pixel costs nothing."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(each) for each in np.percentile(finite, (0.5, 99.5)))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _reach(error: np.ndarray) -> float:
    finite = np.abs(error[np.isfinite(error)])
    reach = float(np.percentile(finite, 99)) if finite.size else 1.0
    return reach or 1.0


def _thin(values: np.ndarray) -> np.ndarray:
    """Take every n-th pixel of a large map; enough for a picture and quick to draw."""
    step = -(-max(values.shape[:2]) // _MAX_SIDE)
    return values[::step, ::step]


@contextmanager
def _figure(
    n_panels: int, aspect: float, *, n_bars: int, has_legend: bool = False
) -> Iterator[Figure]:
    panel_width = _PANEL_HEIGHT * min(max(aspect, 0.4), 2.5)
    width = n_panels * (panel_width + 0.1) + n_bars * _BAR_WIDTH
    with mpl.rc_context({"font.size": 9.0, "axes.titlesize": 9.0, "figure.titlesize": 9.5}):
        height = _PANEL_HEIGHT + _TITLE_HEIGHT + has_legend * _LEGEND_HEIGHT
        yield Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _show_input(
    panel: Axes, image_hwc: np.ndarray | None, aspect: float, *, name: str = "input"
) -> None:
    blank = np.full((2, 2, 3), round(255 * float(NO_VALUE)), dtype=np.uint8)
    missing = image_hwc is None
    shown = blank if image_hwc is None else _thin(image_hwc)
    _show(panel, f"{name} (not stored)" if missing else name, shown, aspect=aspect)


def _show(
    panel: Axes,
    name: str,
    values: np.ndarray,
    *,
    limits: tuple[float, float] | None = None,
    colours: str = VALUES_COLOURS,
    aspect: float | None = None,
) -> AxesImage:
    """Draw one panel; with `aspect` the picture is stretched to that width over height."""
    panel.set_title(name)
    panel.set_xticks([])
    panel.set_yticks([])
    options: dict[str, Any] = {"interpolation": "nearest"}
    if limits is not None:
        panel.set_facecolor(NO_VALUE)  # shows where a value is NaN
        options |= {"vmin": limits[0], "vmax": limits[1], "cmap": colours}
    elif aspect is not None:
        options["aspect"] = values.shape[1] / values.shape[0] / aspect
    return panel.imshow(values, **options)


def _bar(figure: Figure, shown: AxesImage, panel: Axes, unit: str) -> None:
    beside = panel.inset_axes((1.02, 0.0, 0.045, 1.0))  # as high as the panel
    figure.colorbar(shown, cax=beside, label=unit)


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    # No date and no version: equal pictures are equal files.
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()

"""Stored features as one HTML page: a column a tap, a line an image."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from featstore import open as open_store
from featstore.codecs import decode as decode_numbers
from featstore.errors import BadImageError, invalid, not_found
from featstore.files import write_bytes
from featstore.images import decode, encode_png
from featstore.select import select_rows
from featstore.types import Placement
from heads.model import valid_tokens
from heads.token_colours import TokenColours, pca_colours

if TYPE_CHECKING:
    from featstore.api import FeatureSet

_PLAIN = "view = 'plain'"  # a mirrored view shows nothing new


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturePage:
    """The page that was written."""

    path: str
    feature_set: str
    taps: tuple[str, ...]
    rows: tuple[int, ...]
    shares: Mapping[str, float]  # tap to the part of the variance that its colours show


def write_feature_page(
    store: str | Path,
    out: str | Path,
    *,
    feature_set: str | None = None,
    taps: Sequence[str] = (),
    n_images: int = 8,
    where: str | None = None,
) -> FeaturePage:
    """Write a page that shows dense taps as colours beside their images.

    Args:
        store: The store.
        out: File of the page.
        feature_set: Key, the start of one, or name; None where there is only one.
        taps: Dense taps, in this order; none: all that are stored.
        n_images: How many images, evenly spread over the rows.
        where: One SQL expression over the view `samples`, like ``split = 'test'``.

    Raises:
        NotFoundError: The store, the feature set, a tap or a row is not there.
        InvalidInputError: A tap is pooled, or `n_images` is below 1.
    """
    if n_images < 1:
        raise invalid("n_images", n_images, "at least 1")
    features = open_store(store).feature_set(feature_set)
    names = _dense(features, taps)
    condition = _PLAIN if where is None else f"({where}) and {_PLAIN}"
    found = select_rows(features.folder, names, condition)
    count = min(n_images, len(found))
    rows = [int(found[index * len(found) // count]) for index in range(count)]
    placements = features.placements(rows)
    painted = {tap: _paint(features, tap, rows, placements) for tap in names}
    text = _page(features, rows, placements, painted)
    write_bytes(Path(out), text.encode())
    return FeaturePage(
        path=str(out),
        feature_set=features.key,
        taps=tuple(names),
        rows=tuple(rows),
        shares={tap: colours.share for tap, colours in painted.items()},
    )


def _dense(features: FeatureSet, wanted: Sequence[str]) -> list[str]:
    stored = features.taps
    for tap in wanted:
        if tap not in stored:
            raise not_found("tap", tap, stored)
        if stored[tap].grid is None:
            raise invalid("tap", tap, "a dense tap; this one is pooled")
    names = list(dict.fromkeys(wanted)) or [t for t, s in stored.items() if s.grid is not None]
    if not names:
        raise invalid("taps", tuple(stored), "at least one dense tap")
    return names


def _paint(
    features: FeatureSet, tap: str, rows: Sequence[int], placements: Mapping[int, Placement]
) -> TokenColours:
    tokens = decode_numbers(features.read(tap, rows), features.dtype)
    valid = valid_tokens(
        [placements[row] for row in rows], _grid(features, tap), torch.device("cpu")
    )
    return pca_colours(tokens, None if valid is None else valid.numpy())


def _grid(features: FeatureSet, tap: str) -> tuple[int, int]:
    grid = features.taps[tap].grid
    assert grid is not None  # `_dense` has looked
    return grid


def _page(
    features: FeatureSet,
    rows: Sequence[int],
    placements: Mapping[int, Placement],
    painted: Mapping[str, TokenColours],
) -> str:
    samples = features.samples(f"row in ({', '.join(map(str, rows))})").to_pylist()
    by_row = {line["row"]: line for line in reversed(samples)}
    cells = ['<div class="head"><b>image</b>the part that was seen</div>']
    for tap, colours in painted.items():
        grid = _grid(features, tap)
        what = f"{grid[0]} × {grid[1]}, {100 * colours.share:.0f} % of the variance"
        cells.append(f'<div class="head"><b>{escape(tap)}</b>{what}</div>')
    for index, row in enumerate(rows):
        place, line = placements[row], by_row[row]
        cells.append(_photo(features, line, place))
        for tap, colours in painted.items():
            map_hwc = colours.colours[index].reshape(*_grid(features, tap), 4)
            alt = f"{tap} of {line['path']}"
            cells.append(_image(encode_png(_without_padding(map_hwc)), place, alt=alt))
        cells.append(f"<figcaption>{escape(line['dataset'])}: {escape(line['path'])}</figcaption>")
    template = Template(files("heads").joinpath("features.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Features of {features.name}"),
        heading=escape(features.name),
        lead=escape(
            "Tokens as stored, painted by the three directions in which those of a tap differ most "
            f"over these {len(rows)} images together: within a column a colour means one thing, "
            "between columns it means nothing."
        ),
        columns=1 + len(painted),
        cells="".join(cells),
    )


def _photo(features: FeatureSet, line: Mapping[str, Any], place: Placement) -> str:
    """Show the part of the stored thumbnail that the backbone saw."""
    data = features.store.thumbnail(line["dataset"], line["item"])
    try:
        pixels = None if data is None else decode(data)
    except BadImageError:
        pixels = None
    if pixels is None:
        return f'<div class="none" style="{_shape(place)}">not stored</div>'
    scale = np.array(pixels.shape[:2]) / np.array(place.source_hw)
    x0, y0, x1, y1 = place.box
    top, bottom = round(y0 * scale[0]), max(round(y1 * scale[0]), round(y0 * scale[0]) + 1)
    left, right = round(x0 * scale[1]), max(round(x1 * scale[1]), round(x0 * scale[1]) + 1)
    png = encode_png(pixels[top:bottom, left:right])
    return _image(png, place, alt=line["path"], look="photo")


def _image(data: bytes, place: Placement, *, alt: str, look: str = "map") -> str:
    text = base64.b64encode(data).decode()
    return (
        f'<figure><img class="{look}" alt="{escape(alt)}" style="{_shape(place)}" '
        f'src="data:image/png;base64,{text}"></figure>'
    )


def _shape(place: Placement) -> str:
    """Give every cell of a line the shape of what the backbone saw of the image."""
    x0, y0, x1, y1 = place.box
    return f"aspect-ratio: {x1 - x0:.3f} / {y1 - y0:.3f}"


def _without_padding(map_hwc: np.ndarray) -> np.ndarray:
    """Cut a map to the tokens that lie on the image."""
    is_seen = map_hwc[:, :, 3] > 0
    rows, columns = np.flatnonzero(is_seen.any(axis=1)), np.flatnonzero(is_seen.any(axis=0))
    return map_hwc[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

"""The one door to encoded images: probe, decode, draw, thumbnails and label files.

Every image becomes 8-bit RGB the same way:

* EXIF orientation is applied; of an animation the first frame counts;
* transparent pixels are laid over white; colour profiles are not applied;
* 16-bit numbers keep their high byte (65,535 becomes 255), whatever their content, so that images
  stay comparable with each other; floating point numbers must lie in [0, 1];
* the bytes of an ``.npy`` file are an image too: (H, W) or (H, W, C), C being 1, 3 or 4.

Pillow lets other threads run while it decodes and resizes; nothing here holds state.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from featstore.errors import BadImageError, invalid
from featstore.npy import load_npy, npy_shape
from featstore.types import Label, Placement

MAX_PIXELS = 178_956_970
"""Larger images are refused; the number is Pillow's guard against decompression bombs."""

_NPY = b"\x93NUMPY"
_ORIENTATION = 0x0112
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_DAMAGE = (
    OSError,
    SyntaxError,  # Pillow's word for a broken PNG
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def probe(data: bytes) -> tuple[int, int]:
    """Read the height and width of an encoded image from its header, after EXIF orientation.

    Raises:
        BadImageError: The bytes are none, no known image, or one above `MAX_PIXELS`.
    """
    if data.startswith(_NPY):
        height, width = _npy_shape(data)[:2]
        return height, width
    try:
        with _open(data) as image:
            width, height = image.size
            is_turned = _orientation(image, data) >= 5
    except _DAMAGE as error:
        raise _bad(error) from error
    return (width, height) if is_turned else (height, width)


def decode(data: bytes) -> np.ndarray:
    """Decode an encoded image.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        BadImageError: The bytes are none, truncated, damaged, no known image or one above
            `MAX_PIXELS`, or its numbers cannot be told to be colours.
    """
    if data.startswith(_NPY):
        _npy_shape(data)
        return _over_white(_to_eight_bits(_load_npy(data)))
    try:
        with _open(data) as image:
            image.load()
            orientation = _orientation(image, data)
            upright = image.transpose(_TRANSPOSES[orientation]) if orientation > 1 else image
            return _to_rgb(upright)
    except BadImageError:
        raise
    except _DAMAGE as error:
        raise _bad(error) from error


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImageError("The image file is empty (0 bytes).")
    image = Image.open(io.BytesIO(data))
    _check_size(image.height, image.width)
    return image


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise BadImageError(f"The image has no pixels ({height}x{width}).")
    if height * width > MAX_PIXELS:
        raise BadImageError(
            f"The image is too large: {height}x{width} pixels, at most {MAX_PIXELS} are read."
        )


def _bad(error: Exception) -> BadImageError:
    """Say in one sentence why an image does not decode."""
    if isinstance(error, BadImageError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return BadImageError(f"The image is too large: at most {MAX_PIXELS} pixels are read.")
    if isinstance(error, UnidentifiedImageError):
        return BadImageError("The file is no image of a known format.")
    return BadImageError(f"The image does not decode ({error or type(error).__name__}).")


def _orientation(image: Image.Image, data: bytes) -> int:
    """Give the EXIF orientation, 1 to 8, without decoding pixels where it can be helped.

    Pillow decodes a whole PNG to look for EXIF behind its pixels; most PNG files have none.
    """
    if image.format == "PNG" and not any(mark in data for mark in _PNG_EXIF):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _TRANSPOSES else 1


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        return _over_white(_to_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif":
        raise BadImageError(f"The image holds {values.dtype} values instead of numbers.")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also for NaN
            raise BadImageError(
                f"The image holds {values.dtype} numbers from {low} to {high}; floating point "
                "images must lie in [0, 1]."
            )
        scaled: np.ndarray = np.rint(values * 255).astype(np.uint8)
        return scaled
    if low < 0 or high > 65535:
        raise BadImageError(
            f"The image holds {values.dtype} numbers from {low} to {high}; integers of an image "
            "must lie in 0 to 65535."
        )
    high_bytes: np.ndarray = (values >> 8).astype(np.uint8)
    return high_bytes


def _over_white(values: np.ndarray) -> np.ndarray:
    """Turn (H, W) or (H, W, 1, 3 or 4) uint8 into RGB, transparency showing white."""
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[2] == 1:
        return np.repeat(values, 3, axis=2)
    if values.shape[2] == 3:
        return np.ascontiguousarray(values)
    colour, alpha = values[..., :3].astype(np.uint32), values[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _npy_shape(data: bytes) -> tuple[int, ...]:
    """Read and check the shape in the header of .npy bytes that hold an image."""
    try:
        shape = npy_shape(io.BytesIO(data))
    except (ValueError, KeyError, EOFError, SyntaxError) as error:
        raise BadImageError(f"The .npy header does not parse ({error}).") from error
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise BadImageError(f"An .npy image must be (H, W) or (H, W, 1, 3 or 4), not {shape}.")
    _check_size(shape[0], shape[1])
    return shape


def _load_npy(data: bytes) -> np.ndarray:
    try:
        return np.asarray(load_npy(io.BytesIO(data)))
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise BadImageError(f"The .npy array does not load ({error}).") from error


def draw(
    pixels_hwc: np.ndarray,
    placement: Placement,
    *,
    interpolation: str,
    fill_rgb: tuple[int, int, int],
    via: int | None = None,
    upscale: str | None = None,
) -> np.ndarray:
    """Draw an image into the backbone's input, smoothing where it shrinks.

    With a basis `via` it is drawn on a square of that side first, placed there as in the input.

    Args:
        pixels_hwc: (source_h, source_w, 3) uint8.
        placement: Which region goes where.
        interpolation: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
        fill_rgb: Colour of the padding.
        via: Side in pixels of the basis; None: in one step.
        upscale: Filter from the basis to the input; None: `interpolation`.

    Returns:
        (input_h, input_w, 3) uint8.

    Raises:
        InvalidInputError: The interpolation is unknown, or `pixels_hwc` is not of the
            placement's size.
    """
    last_filter = interpolation if via is None or upscale is None else upscale
    for name in (interpolation, last_filter):
        if name not in _FILTERS:
            raise invalid("interpolation", name, f"one of {', '.join(_FILTERS)}")
    if pixels_hwc.shape[:2] != placement.source_hw:
        raise invalid("pixels_hwc", pixels_hwc.shape, f"of size {placement.source_hw}")
    image = Image.fromarray(np.ascontiguousarray(pixels_hwc))
    x0, y0, x1, y1 = placement.dst
    box: tuple[float, float, float, float] | None = placement.box
    if via is not None:
        input_h, input_w = placement.input_hw
        basis = (round(via * (x1 - x0) / input_w) or 1, round(via * (y1 - y0) / input_h) or 1)
        image, box = image.resize(basis, _FILTERS[interpolation], box=box), None
    drawn = np.asarray(image.resize((x1 - x0, y1 - y0), _FILTERS[last_filter], box=box))
    canvas = np.empty((*placement.input_hw, 3), dtype=np.uint8)
    canvas[:] = np.asarray(fill_rgb, dtype=np.uint8)
    canvas[y0:y1, x0:x1] = drawn[:, ::-1] if placement.is_flipped else drawn
    return canvas


def thumbnail(pixels_hwc: np.ndarray, long_side: int = 320) -> bytes:
    """Encode a small JPEG of an image; one that is small already keeps its size.

    Args:
        pixels_hwc: (H, W, 3) uint8.
        long_side: Longest side of the result in pixels.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels_hwc))
    scale = min(long_side / max(image.size), 1.0)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    small = image if size == image.size else image.resize(size, Image.Resampling.BOX)
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=85)
    return sink.getvalue()


def encode_png(pixels_hwc: np.ndarray) -> bytes:
    """Encode an image without loss: a PNG file.

    Args:
        pixels_hwc: (H, W, 3) or, with opacity, (H, W, 4) uint8.
    """
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_hwc)).save(sink, "PNG")
    return sink.getvalue()


def decode_label(label: Label) -> tuple[np.ndarray, np.ndarray]:
    """Decode a dense label to its own resolution.

    Returns:
        (H, W) physical values, and (H, W) bool, False where the label has no value. Values are
        float32 where the label has a scale or floating point numbers, else int32 (a palette PNG
        gives its indices).

    Raises:
        BadImageError: The bytes do not decode to one number a pixel.
        InvalidInputError: The encoding is neither "png" nor "npy".
    """
    if label.encoding not in ("png", "npy"):
        raise invalid("encoding", label.encoding, "png or npy")
    values = _load_npy(label.data) if label.encoding == "npy" else _decode_indices(label.data)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "uifb":
        raise BadImageError(
            f"A {label.kind} label must hold one number a pixel (H, W), not {values.dtype} of "
            f"shape {values.shape}."
        )
    valid = np.isfinite(values)
    if label.invalid is not None:
        valid &= values != label.invalid
    if label.scale == 1.0 and values.dtype.kind != "f":
        return _to_int32(values, label.kind), valid
    return (values * np.float64(label.scale)).astype(np.float32), valid


def _to_int32(values: np.ndarray, kind: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < -(2**31) or high >= 2**31:
        raise BadImageError(f"A {kind} label must fit 32 bits; its numbers are {low} to {high}.")
    return values.astype(np.int32)


def _decode_indices(data: bytes) -> np.ndarray:
    """Decode a one-channel image without touching its numbers: no palette, no scaling."""
    try:
        with _open(data) as image:
            image.load()
            return np.array(image)
    except _DAMAGE as error:
        raise _bad(error) from error

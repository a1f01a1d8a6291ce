"""Read the pictures that records name: files and data URLs, checked, and never fetched from a network.

A picture that mistral-common would show to a model otherwise than people see it is refused: one with transparent parts, with
several frames, or in colours for printing.
"""

from __future__ import annotations

import functools
import io
from typing import Any, NamedTuple

import numpy as np

from moe_train.data.records.data_urls import data_of
from moe_train.data.records.problem import Problem, brief

MOST_PIXELS = 100_000_000
"""Largest number of pixels of a picture, which take about 1.5 GB while it is resized."""
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_PLAIN_MODES = ("RGB", "L", "1")
_WITH_ALPHA = ("RGBA", "LA", "PA", "P")
RULE = "picture"
"""Rule that a record with an unusable picture breaks."""


class Picture(NamedTuple):
    """A picture that has been checked."""

    data: bytes
    """The file as it is."""
    width: int
    height: int


def _pillow() -> Any:
    """Import Pillow, which only records with pictures need."""
    try:
        from PIL import Image
    except ImportError as error:
        raise Problem(RULE, "pictures are read with Pillow, which is not installed", "pip install 'moe-train[vision]'") from error
    return Image


# Cached, since a record is checked, tokenized and stored one after the other.
@functools.lru_cache(maxsize=4)
def open_picture(reference: str) -> Picture:
    """Read and check a picture.

    Args:
        reference: a data URL, or the path of a file (`records.media.located_path`).

    Raises:
        Problem: there is no such picture, or it cannot be used.
    """
    name = brief(reference)
    data = data_of(reference, name, RULE, "picture")
    if not data:
        raise Problem(RULE, f"the picture {name} is empty: 0 bytes", "replace it, or drop the record")
    Image = _pillow()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_header(image, name)
            image.load()
            _check_colours(image, name)
            return Picture(data, image.width, image.height)
    except Problem:
        raise
    except Image.UnidentifiedImageError as error:
        raise Problem(RULE, f"{name} is no picture in any of {', '.join(_FORMATS)}", "replace it, or drop the record") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, "more than a quarter of a billion") from error
    # Pillow's decoders raise almost anything for damaged files.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Problem(RULE, f"the picture {name} cannot be decoded: {reason}", "replace it, or drop the record") from error


def _too_large(name: str, pixels: object) -> Problem:
    return Problem(
        RULE, f"the picture {name} has {pixels} pixels, and at most {MOST_PIXELS:,} are read", "shrink it, or drop the record"
    )


def _check_header(image: Any, name: str) -> None:
    """Check what a file states before its pixels are decoded."""
    if image.width * image.height > MOST_PIXELS:
        raise _too_large(name, f"{image.width} x {image.height}")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise Problem(RULE, f"the picture {name} has {frames} frames, and a model sees one", "save the frame that is meant")


def _check_colours(image: Any, name: str) -> None:
    """Check that the colours are those that people see."""
    if image.mode in _PLAIN_MODES:
        return
    if image.mode not in _WITH_ALPHA:
        raise Problem(RULE, f"the picture {name} has colours of mode {image.mode}, not RGB or grey", "convert it to RGB")
    if image.mode == "P" and "transparency" not in image.info:
        return
    if image.convert("RGBA").getextrema()[3][0] < 255:
        message = f"the picture {name} has transparent parts, which a model would see as white"
        raise Problem(RULE, message, "save it on the background that is meant")


def rgb_of(data: bytes) -> np.ndarray:
    """Decode a picture that has been checked to (H, W, 3) uint8."""
    with _pillow().open(io.BytesIO(data), formats=_FORMATS) as image:
        return np.asarray(image.convert("RGB"))

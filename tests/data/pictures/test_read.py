"""Pictures that can be used, and the one line that refuses all others."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.image import _convert_to_rgb
from PIL import Image

from moe_train.data.pictures import read
from moe_train.data.pictures.read import open_picture, rgb_of
from moe_train.data.records.problem import Problem

NOISE = np.random.default_rng(0).integers(0, 256, (6, 9, 4), np.uint8)


def saved(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def opaque() -> Image.Image:
    pixels = NOISE.copy()
    pixels[..., 3] = 255
    return Image.fromarray(pixels)


USABLE: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved(Image.fromarray(NOISE[..., :3])),
    "jpeg": lambda: saved(Image.fromarray(NOISE[..., :3]), "JPEG"),
    "webp": lambda: saved(Image.fromarray(NOISE[..., :3]), "WEBP"),
    "grey": lambda: saved(Image.fromarray(NOISE[..., 0])),
    "black and white": lambda: saved(Image.fromarray(NOISE[..., 0]).convert("1")),
    "palette": lambda: saved(Image.fromarray(NOISE[..., :3]).convert("P")),
    "opaque alpha": lambda: saved(opaque()),
}


@pytest.mark.parametrize("kind", USABLE)
def test_usable_pictures_have_the_colours_of_mistral_common(kind: str, tmp_path: Path) -> None:
    data = USABLE[kind]()
    (tmp_path / "picture").write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert open_picture(url) == open_picture(str(tmp_path / "picture")) == (data, 9, 6)
    assert np.array_equal(rgb_of(data), np.asarray(_convert_to_rgb(Image.open(io.BytesIO(data)))))


def animated() -> bytes:
    frames = [Image.fromarray(np.roll(NOISE[..., :3], i)) for i in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


UNUSABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "no bytes": (lambda: b"", "is empty"),
    "text": (lambda: b"not a picture", "is no picture"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture"),
    "truncated png": (lambda: USABLE["png"]()[:-60], "cannot be decoded"),
    "truncated jpeg": (lambda: USABLE["jpeg"]()[:200], "cannot be decoded|is no picture"),
    "animated": (animated, "3 frames"),
    "transparent": (lambda: saved(Image.fromarray(NOISE)), "transparent parts"),
    "grey with alpha": (lambda: saved(Image.fromarray(NOISE).convert("LA")), "transparent parts"),
    "cmyk": (lambda: saved(Image.fromarray(NOISE[..., :3]).convert("CMYK"), "JPEG"), "mode CMYK"),
    "16 bits": (lambda: saved(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 256)), "mode I"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_pictures_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    data, reason = UNUSABLE[kind]
    (tmp_path / "picture").write_bytes(data())
    with pytest.raises(Problem, match=reason) as problem:
        open_picture(str(tmp_path / "picture"))
    assert problem.value.rule == "picture" and "\n" not in str(problem.value)


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:image/png;base64,ab!c", "data:image/png;base64,YWJj", "data:"])
def test_data_urls_that_hold_no_picture(url: str) -> None:
    with pytest.raises(Problem, match=r"data URL|is no picture|base64"):
        open_picture(url)


def test_a_picture_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="there is no picture"):
        open_picture(str(tmp_path / "none.png"))
    with pytest.raises(Problem, match="cannot be read"):
        open_picture(str(tmp_path))


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picture").write_bytes(USABLE["png"]())
    monkeypatch.setattr(read, "MOST_PIXELS", 53)
    with pytest.raises(Problem, match="9 x 6 pixels, and at most 53"):
        open_picture(str(tmp_path / "picture"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(Problem, match="pixels, and at most"):
        open_picture(str(tmp_path / "picture"))

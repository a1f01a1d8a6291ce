"""What an export of a base does not have is said and recorded."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_train.commands.left_out import report_left_out, report_rounding
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.commands.wrapper import TEXT, TOWER, save_run_on_wrapper, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE


def test_a_tower_is_named(small_tokenizer: HuggingFace, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    for source in ("run", "base"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            report = report_left_out(tmp_path / source, "for a reason")["left_out"]
        assert (report["source"], sorted(report["tensors"])) == (str(tmp_path / "base"), sorted(TOWER))
        assert f"vision tower and projector ({len(TOWER)} tensors" in caplog.text and "for a reason" in caplog.text


@pytest.mark.parametrize(
    ("stored", "dtypes", "is_said"),
    [
        (np.float16, ("bfloat16", "bfloat16"), True),
        (np.float16, ("float32", "bfloat16"), True),
        (np.float16, ("bfloat16", "float32"), True),
        (np.float16, ("float32", "float32"), False),
        (np.float32, ("bfloat16", "bfloat16"), False),
    ],
)
def test_rounding_of_float16_is_said(
    stored: type, dtypes: tuple[str, str], is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with jax.set_mesh(ONE):
        save_wrapper(tmp_path / "base", random_parameters(TEXT), stored)
    with caplog.at_level(logging.WARNING):
        report = report_rounding(tmp_path / "base", dtypes)
    assert report == ({"rounded_from": "float16"} if is_said else {})
    assert ("bfloat16 rounds their values" in caplog.text) == is_said

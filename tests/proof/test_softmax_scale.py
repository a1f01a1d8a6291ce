"""The scale that each reader computes from its files, for both corrections, and files that would change it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.proof.checks import Fault, NotChecked
from moe_train.proof.softmax_scale import check_softmax_scale
from moe_train.weights.gguf import container
from moe_train.weights.gguf import settings as gguf_settings
from moe_train.weights.mistral import params_json
from tests.tiny import LATENT, MIXTRAL
from tests.weights.mistral.models import MISTRAL4

MSCALE = 0.1 * math.log(4.0) + 1


def corrected(correction: str) -> config.Model:
    return MISTRAL4.model_copy(update={"attention": LATENT.model_copy(update={"scale_correction": correction})})


def write(directory: Path, layout: str, model: config.Model, **changes: Any) -> None:
    if layout == "mistral":
        params = params_json.write_model_config(model)
        (directory / "params.json").write_text(json.dumps({**params, "yarn": {**params["yarn"], **changes}}))
        return
    keys = gguf_settings.architecture_settings(model)
    keys = {key: value for key, value in keys.items() if changes.get(key.rpartition(".")[2], value) is not None}
    container.write_gguf(directory / "model.gguf", keys, [], lambda _: [])


@pytest.mark.parametrize("layout", ["mistral", "gguf"])
@pytest.mark.parametrize(("correction", "scale"), [("none", 18**-0.5), ("mscale_squared", MSCALE**2 * 18**-0.5)])
def test_files_have_the_scale_of_training(layout: Any, correction: str, scale: float, tmp_path: Path) -> None:
    write(tmp_path, layout, corrected(correction))
    finding = check_softmax_scale(tmp_path, layout, corrected(correction))
    assert finding.metrics["scale"] == pytest.approx(scale, rel=1e-6)
    other = corrected("none" if correction == "mscale_squared" else "mscale_squared")
    with pytest.raises(Fault, match=r"would multiply scores by .* with these files; the model was trained with"):
        check_softmax_scale(tmp_path, layout, other)


def test_a_key_that_was_left_out_is_found(tmp_path: Path) -> None:
    write(tmp_path, "gguf", corrected("none"), attn_factor=None)
    with pytest.raises(Fault, match=r"llama.cpp would multiply scores by"):
        check_softmax_scale(tmp_path, "gguf", corrected("none"))


@pytest.mark.parametrize(
    ("rope", "scores", "rotation"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, MSCALE**2, 1.0),
        ({"mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": 1.0}, 1.0, 1.0),
        ({"mscale": 0.0, "mscale_all_dim": 0.0}, 1.0, MSCALE),
    ],
)
def test_transformers_takes_its_scale_from_mscale_all_dim(
    rope: dict[str, float], scores: float, rotation: float, tmp_path: Path
) -> None:
    fields = {"qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, **rope}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = corrected("none" if scores == 1 else "mscale_squared")
    if rotation == 1:
        assert check_softmax_scale(tmp_path, "hf", model).metrics["scale"] == pytest.approx(scores * 18**-0.5)
        return
    with pytest.raises(Fault, match=r"transformers would multiply cos and sin by 1.13"):
        check_softmax_scale(tmp_path, "hf", model)


def test_other_attention_has_no_scale_in_doubt(tmp_path: Path) -> None:
    with pytest.raises(NotChecked, match="no latent attention"):
        check_softmax_scale(tmp_path, "hf", MIXTRAL)

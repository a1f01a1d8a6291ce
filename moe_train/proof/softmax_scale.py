"""The softmax scale that the readers of an export compute from its files, compared with the scale of training.

Readers of the same latent attention differ: transformers multiplies scores by mscale squared if `mscale_all_dim` is stated,
vLLM if `yarn.apply_scale` is, llama.cpp by a product of two keys. Each formula is that of the reader; none comes from `weights`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.proof import reread
from moe_train.proof.checks import Fault, Finding, NotChecked
from moe_train.proof.expected import ModelLayout

SCALE_TOLERANCE = 1e-6
"""Largest relative difference; GGUF keys are float32."""


class Scales(NamedTuple):
    """Factors of latent attention."""

    scores: float
    """Factor on q·k."""
    rotation: float
    """Factor on cos and sin."""
    reader: str
    """Name of the reader that computes them."""


def check_softmax_scale(directory: Path, layout: ModelLayout, model: config.Model) -> Finding:
    """Compare the scale that the files' reader computes with the scale of the model.

    Raises:
        Fault: they differ.
        NotChecked: the model has no latent attention, where the scale is not in doubt.
    """
    attention = model.attention
    if not isinstance(attention, config.MultiHeadLatentAttention):
        raise NotChecked("the model has no latent attention")
    found = _scales_of_files(directory, layout)
    trained = _trained_scales(attention, model.rope)
    pairs = (("scores", found.scores, trained.scores), ("cos and sin", found.rotation, trained.rotation))
    for label, read, computed in pairs:
        if not math.isclose(read, computed, rel_tol=SCALE_TOLERANCE):
            raise Fault(
                f"{found.reader} would multiply {label} by {read:.7g} with these files; the model was trained with {computed:.7g}"
            )
    return Finding(
        f"{found.reader} multiplies scores by {found.scores:.7g}, as in training",
        {"reader": found.reader, "scale": found.scores, "trained": trained.scores, "tolerance": SCALE_TOLERANCE},
    )


def _trained_scales(attention: config.MultiHeadLatentAttention, rope: config.DefaultRope | config.YarnRope) -> Scales:
    """Return the scales of the model, as the config documents them."""
    scores = 1 / math.sqrt(attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    if isinstance(rope, config.DefaultRope):
        return Scales(scores, 1.0, "moe_train")
    if attention.scale_correction == "mscale_squared":
        scores *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    rotation = _mscale(rope.factor, 1.0)
    if rope.mscale and rope.mscale_all_dim:
        rotation = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return Scales(scores, rotation, "moe_train")


def _mscale(factor: float, m: float) -> float:
    """Return YaRN's temperature (arXiv:2309.00071, section 3.4) as DeepSeek's code extends it."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def _scales_of_files(directory: Path, layout: ModelLayout) -> Scales:
    """Return the scales that the layout's reader computes."""
    match layout:
        case "hf":
            fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            # The text model of a vision wrapper has its fields in a section.
            return _transformers_scales(fields.get("text_config", fields))
        case "mistral":
            return _vllm_scales(json.loads((directory / "params.json").read_text(encoding="utf-8")))
        case "gguf":
            (file,) = (file for file in directory.glob("*.gguf") if "mmproj" not in file.name.lower())
            return _llama_cpp_scales(reread.gguf_settings(file))


def _transformers_scales(fields: dict[str, Any]) -> Scales:
    """Return what `modeling_mistral4.py` and `modeling_deepseek_v3.py` of transformers compute (`modeling_rope_utils.py`)."""
    scores = (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]) ** -0.5
    rope = fields["rope_parameters"]
    if rope.get("rope_type", "default") == "default":
        return Scales(scores, 1.0, "transformers")
    factor = rope["factor"]
    all_dim = rope.get("mscale_all_dim", 0)
    if all_dim:
        scores *= _mscale(factor, all_dim) ** 2
    rotation = rope.get("attention_factor")
    if rotation is None:
        mscale = rope.get("mscale")
        rotation = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return Scales(scores, rotation, "transformers")


def _vllm_scales(fields: dict[str, Any]) -> Scales:
    """Return what vLLM computes (`transformers_utils/configs/mistral.py`: an mscale_all_dim of 1 if the scale is applied)."""
    scores = (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]) ** -0.5
    yarn = fields.get("yarn")
    if yarn and yarn.get("apply_scale", True):
        scores *= _mscale(yarn["factor"], 1.0) ** 2
    return Scales(scores, 1.0, "vLLM")


def _llama_cpp_scales(keys: dict[str, Any]) -> Scales:
    """Return what llama.cpp computes (`llama-context.cpp` and `models/deepseek2.cpp`)."""
    arch = keys["general.architecture"]
    scores = keys[f"{arch}.attention.key_length_mla"] ** -0.5
    if keys.get(f"{arch}.rope.scaling.type", "none") != "yarn":
        return Scales(scores, 1.0, "llama.cpp")
    prefix = f"{arch}.rope.scaling"
    factor = keys[f"{prefix}.factor"]
    # The loader divides the key by 0.1; an mscale of 1 is assumed beside it.
    log_multiplier = keys.get(f"{prefix}.yarn_log_multiplier", 0.0) / 0.1
    attn_factor = _mscale(factor, 1.0) / (_mscale(factor, log_multiplier) if log_multiplier else 1.0)
    yarn_factor = 1 + 0.1 * math.log(factor)
    attn_factor *= keys.get(f"{prefix}.attn_factor", 1.0) / yarn_factor
    original = attn_factor * yarn_factor
    scores *= (original * (1 + 0.1 * log_multiplier * math.log(factor))) ** 2
    return Scales(scores, original, "llama.cpp")

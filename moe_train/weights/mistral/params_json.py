"""Convert Mistral's `params.json` to `config.Model` and back.

A field for which readers have different defaults must be stated. The file does not name a family, so the fields decide.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from moe_train import config
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.fp8 import sections
from moe_train.weights.latent_norms import check_latent_norm_eps
from moe_train.weights.mistral import latent_params
from moe_train.weights.mistral.params_fields import Llama4Scaling, Moe, Params, Yarn

log = logging.getLogger(__name__)

PARAMS_FILE = "params.json"
"""Name of the file that states a model's architecture."""

# The only values whose meaning is implemented here.
_REQUIRED: JsonObject = {
    "model_type": "transformer",
    "activation": "silu",
    "use_biases": False,
    "causal": True,
}
# Fields that do not affect the text model's mathematics.
_IGNORED = {"dtype", "max_batch_size", "vision_encoder", "multimodal", "lora", "quantization", "quantization_config"}
_MAX_SEQ_LEN = 128_000
"""What mistral-inference and vLLM assume if nothing is stated."""


def read_model_config(directory: str | Path) -> config.Model:
    """Read the architecture from a folder's `params.json` (or that file).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the architecture is not implemented here; the message names the field.
    """
    file = Path(directory)
    file = file / PARAMS_FILE if file.is_dir() else file
    fields = read_object(file)
    try:
        for key, required in _REQUIRED.items():
            if fields.get(key, required) not in (required, None):
                raise ValueError(f"{key} is {fields[key]!r}, which is not implemented; it has to be {required!r}")
        sections.find_section(fields)  # refuses quantizations that are not supported
        params = Params.model_validate({key: value for key, value in fields.items() if key not in _REQUIRED})
        if unknown := sorted(set(params.model_extra or ()) - _IGNORED):
            log.warning(
                "%s has fields that are not read: %s; make sure that they do not change what the model computes",
                file,
                ", ".join(unknown),
            )
        model = _model(params)
        check_latent_norm_eps(model, "vLLM")
        return model
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            problem = "is not implemented"
        location = ".".join(str(part) for part in first["loc"]) or "the model"
        raise ValueError(f"{file}: {location}: {problem}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _model(params: Params) -> config.Model:
    """Convert validated fields."""
    query_scaling = None
    if params.llama_4_scaling:
        scaling = params.llama_4_scaling
        query_scaling = {"beta": scaling.beta, "original_max_seq_len": scaling.original_max_position_embeddings}
    windows = _windows(params)
    if params.has_latents:
        if windows != (None,):
            raise ValueError("sliding_window is stated, which is not supported together with kv_lora_rank; remove it")
        family = latent_params.family(params)
        attention = latent_params.attention(params)
        ffn = latent_params.ffn(params)
    else:
        family = _family(params, windows)
        attention = {
            "name": "gqa",
            "num_heads": params.n_heads,
            "num_kv_heads": params.n_kv_heads,
            "head_dim": params.head_dim,
            "windows": windows,
        }
        ffn = _ffn(params)
    return config.Model.model_validate(
        {
            "family": family,
            "vocab_size": params.vocab_size,
            "model_dim": params.dim,
            "num_layers": params.n_layers,
            "attention": {**attention, "query_scaling": query_scaling},
            "ffn": ffn,
            "rope": _rope(params),
            "norm_eps": params.norm_eps,
            "tie_embeddings": params.tied_embeddings,
            "max_seq_len": params.max_position_embeddings or params.max_seq_len or _MAX_SEQ_LEN,
        }
    )


def _ffn(params: Params) -> JsonObject:
    """Return the section `ffn` of a model with grouped-query attention."""
    moe = params.moe
    if moe is None:
        return {"name": "dense", "ffn_dim": params.hidden_dim}
    # vLLM takes a model with shared experts for one with latent attention; mistral-inference does not have them.
    for key in ("num_shared_experts", "first_k_dense_replace"):
        if getattr(moe, key):
            raise ValueError(f"moe.{key} is {getattr(moe, key)}, which is supported only together with kv_lora_rank")
    if moe.routed_scale != 1:
        raise ValueError(f"moe.routed_scale is {moe.routed_scale}, which is supported only together with kv_lora_rank")
    return {
        "name": "moe",
        "ffn_dim": moe.expert_hidden_dim or params.hidden_dim,
        "num_experts": moe.num_experts,
        "experts_per_token": moe.num_experts_per_tok,
    }


def _family(params: Params, windows: tuple[int | None, ...]) -> config.FamilyName:
    """Return the smallest family that has the features of these fields, since the file does not name one."""
    present: dict[config.Feature, bool] = {
        "interleaved_windows": len(set(windows)) > 1,
        "yarn": params.yarn is not None,
        "query_scaling": params.llama_4_scaling is not None,
    }
    features = [feature for feature, is_present in present.items() if is_present]
    return config.family_with(features, sparse=params.moe is not None, file_format="mistral")


def _windows(params: Params) -> tuple[int | None, ...]:
    """Return the shortest period of windows."""
    if params.sliding_window is not None and params.hidden_sliding_window is not None:
        raise ValueError("sliding_window and _sliding_window are both stated; keep one")
    window = params.hidden_sliding_window if params.sliding_window is None else params.sliding_window
    if not isinstance(window, list):
        return (window,)
    if not window or params.n_layers % len(window):
        raise ValueError(f"sliding_window has {len(window)} entries; n_layers {params.n_layers} has to be a multiple of that")
    size = len(window)
    for period in range(1, size):
        if size % period == 0 and window[:period] * (size // period) == window:
            return tuple(window[:period])
    return tuple(window)


def _rope(params: Params) -> JsonObject:
    """Return the section `rope` of a model config."""
    theta = params.rope_theta
    yarn = params.yarn
    if theta is None:
        if params.sliding_window is not None or yarn:
            raise ValueError(
                "rope_theta is not stated, and its default differs between versions of mistral-inference; add it "
                "(Mistral 7B v0.1 has 10000.0)"
            )
        theta = 1e6
    if yarn is None:
        return {"name": "default", "theta": theta}
    # Equal mscales cancel to a factor of 1 on cos and sin; zeros stand for 0.1 log(factor) + 1.
    mscale = 0.0 if yarn.apply_scale and not params.has_latents else 1.0
    return {
        "name": "yarn",
        "theta": theta,
        "factor": yarn.factor,
        "original_max_seq_len": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta,
        "beta_slow": yarn.alpha,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


def write_model_config(model: config.Model) -> JsonObject:
    """Return the `params.json` of an export. Raises ValueError if the format cannot express the model."""
    check_latent_norm_eps(model, "vLLM")
    rope = model.rope
    windows = list(model.attention.windows)
    query_scaling = model.attention.query_scaling
    scaling = None
    if query_scaling is not None:
        scaling = Llama4Scaling(beta=query_scaling.beta, original_max_position_embeddings=query_scaling.original_max_seq_len)
    params = Params(
        dim=model.model_dim,
        n_layers=model.num_layers,
        norm_eps=model.norm_eps,
        vocab_size=model.vocab_size,
        rope_theta=rope.theta,
        sliding_window=windows if len(windows) > 1 else windows[0],
        max_seq_len=model.max_seq_len,
        # The name that vLLM reads.
        max_position_embeddings=model.max_seq_len,
        tied_embeddings=model.tie_embeddings,
        yarn=_yarn(model, rope) if isinstance(rope, config.YarnRope) else None,
        llama_4_scaling=scaling,
        **_sizes(model),
    )
    # What is written must be read back as the same mathematics, also by later versions of this file.
    assert _model(params) == as_written(model), params
    # mistral-inference accepts no further field in `moe`, so defaults that are not stated above are not written.
    return params.model_dump(exclude_none=True, exclude_unset=True)


def _sizes(model: config.Model) -> JsonObject:
    """Return the fields of attention and feed-forward layers."""
    if isinstance(model.attention, config.MultiHeadLatentAttention):
        return latent_params.sizes(model, model.attention)
    a = model.attention
    ffn = model.ffn
    sizes: JsonObject = {
        "head_dim": a.head_dim,
        "hidden_dim": ffn.ffn_dim,
        "n_heads": a.num_heads,
        "n_kv_heads": a.num_kv_heads,
    }
    if isinstance(ffn, config.MoeFfn):
        sizes["moe"] = Moe(num_experts=ffn.num_experts, num_experts_per_tok=ffn.experts_per_token)
    return sizes


def _yarn(model: config.Model, rope: config.YarnRope) -> Yarn:
    """Convert the section `rope`; Mistral's alpha and beta are YaRN's beta_slow and beta_fast."""
    return Yarn(
        factor=float(rope.factor),
        original_max_position_embeddings=rope.original_max_seq_len,
        alpha=float(rope.beta_slow),
        beta=float(rope.beta_fast),
        apply_scale=_applies_scale(model, rope),
    )


def _applies_scale(model: config.Model, rope: config.YarnRope) -> bool:
    """Return `yarn.apply_scale`; raises ValueError for two mscales that params.json cannot express."""
    if isinstance(model.attention, config.MultiHeadLatentAttention):
        return latent_params.applies_scale(model.attention, rope)
    if not (rope.mscale and rope.mscale_all_dim):
        return True
    if rope.mscale != rope.mscale_all_dim:
        raise ValueError(
            f"rope.mscale {rope.mscale} and rope.mscale_all_dim {rope.mscale_all_dim} differ; params.json can only state equal "
            "ones (yarn.apply_scale false) or none (true)"
        )
    return False


def as_written(model: config.Model) -> config.Model:
    """Return the model as it is read back from params.json.

    It has the same mathematics, without what the file cannot express: the family if several fit, how weights were initialized, and
    which mscale gave a factor of 1.
    """
    rope = model.rope
    if isinstance(rope, config.YarnRope):
        scales_rotations = _applies_scale(model, rope) and isinstance(model.attention, config.GroupedQueryAttention)
        mscale = 0.0 if scales_rotations else 1.0
        rope = rope.model_copy(update={"mscale": mscale, "mscale_all_dim": mscale})
    sparse = isinstance(model.ffn, config.MoeFfn)
    family = config.family_with(config.features(model), sparse=sparse, file_format="mistral")
    stddev = config.Model.model_fields["init_stddev"].default
    return model.model_copy(update={"rope": rope, "family": family, "init_stddev": stddev})

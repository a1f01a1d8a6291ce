"""Convert Mistral's `params.json` to `config.Model` and back.

Its readers are mistral-inference (`args.py`), vLLM (`transformers_utils/configs/mistral.py`) and mistral-finetune; a field for
which they have different defaults must be stated. The file does not name a family, so the fields decide.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_train import config
from moe_train.config import Positive, PositiveFloat
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.fp8 import sections

log = logging.getLogger(__name__)

PARAMS_FILE = "params.json"
"""Name of the file that states a model's architecture."""

# The only values whose meaning is implemented here.
_REQUIRED: JsonObject = {
    "model_type": "transformer",
    "activation": "silu",
    "use_biases": False,
    "causal": True,
    # The sizes of multi-head latent attention; None: not stated.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")),
}
# Fields that do not affect the text model's mathematics.
_IGNORED = {"dtype", "max_batch_size", "vision_encoder", "multimodal", "lora", "quantization", "quantization_config"}
_MAX_SEQ_LEN = 128_000
"""What mistral-inference and vLLM assume if nothing is stated."""


class Moe(BaseModel):
    """The experts of a sparse model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_experts: Positive
    num_experts_per_tok: Positive


class Yarn(BaseModel):
    """YaRN's settings.

    `alpha` and `beta` are the numbers of rotations at which interpolation is full and at which it ends. With `apply_scale`, cos and
    sin are multiplied by 0.1 log(factor) + 1.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    factor: PositiveFloat
    original_max_position_embeddings: Positive
    alpha: PositiveFloat = 1.0
    beta: PositiveFloat = 32.0
    apply_scale: bool = True


class Llama4Scaling(BaseModel):
    """Scaling of queries by position."""

    model_config = ConfigDict(extra="forbid", strict=True)

    beta: PositiveFloat
    original_max_position_embeddings: Positive


class Params(BaseModel):
    """The fields that are read and written, in the order of Mistral's own files."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, populate_by_name=True)

    dim: Positive
    n_layers: Positive
    head_dim: Positive
    hidden_dim: Positive
    n_heads: Positive
    n_kv_heads: Positive
    norm_eps: PositiveFloat
    vocab_size: Positive
    rope_theta: PositiveFloat | None = None
    sliding_window: Positive | list[Positive | None] | None = None
    """One window for all layers, or a period of layers."""
    # An alias, since pydantic takes a name with a leading underscore for a private attribute.
    hidden_sliding_window: Positive | list[Positive | None] | None = Field(None, alias="_sliding_window")
    """The same under a name that an older vLLM ignores."""
    max_seq_len: Positive | None = None
    max_position_embeddings: Positive | None = None
    tied_embeddings: bool = False
    moe: Moe | None = None
    yarn: Yarn | None = None
    llama_4_scaling: Llama4Scaling | None = None


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
        return _model(params)
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
    windows = _windows(params)
    ffn: JsonObject = {"name": "dense", "ffn_dim": params.hidden_dim}
    if params.moe:
        ffn |= {"name": "moe", "num_experts": params.moe.num_experts, "experts_per_token": params.moe.num_experts_per_tok}
    query_scaling = None
    if params.llama_4_scaling:
        scaling = params.llama_4_scaling
        query_scaling = {"beta": scaling.beta, "original_max_seq_len": scaling.original_max_position_embeddings}
    return config.Model.model_validate(
        {
            "family": _family(params, windows),
            "vocab_size": params.vocab_size,
            "model_dim": params.dim,
            "num_layers": params.n_layers,
            "attention": {
                "name": "gqa",
                "num_heads": params.n_heads,
                "num_kv_heads": params.n_kv_heads,
                "head_dim": params.head_dim,
                "windows": windows,
                "query_scaling": query_scaling,
            },
            "ffn": ffn,
            "rope": _rope(params),
            "norm_eps": params.norm_eps,
            "tie_embeddings": params.tied_embeddings,
            "max_seq_len": params.max_position_embeddings or params.max_seq_len or _MAX_SEQ_LEN,
        }
    )


def _family(params: Params, windows: tuple[int | None, ...]) -> str:
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
    mscale = 0.0 if yarn.apply_scale else 1.0
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
    a = model.attention
    rope = model.rope
    ffn = model.ffn
    windows = list(a.windows)
    moe = None
    if isinstance(ffn, config.MoeFfn):
        moe = Moe(num_experts=ffn.num_experts, num_experts_per_tok=ffn.experts_per_token)
    scaling = None
    if a.query_scaling is not None:
        scaling = Llama4Scaling(beta=a.query_scaling.beta, original_max_position_embeddings=a.query_scaling.original_max_seq_len)
    params = Params(
        dim=model.model_dim,
        n_layers=model.num_layers,
        head_dim=a.head_dim,
        hidden_dim=ffn.ffn_dim,
        n_heads=a.num_heads,
        n_kv_heads=a.num_kv_heads,
        norm_eps=model.norm_eps,
        vocab_size=model.vocab_size,
        rope_theta=rope.theta,
        sliding_window=windows if len(windows) > 1 else windows[0],
        max_seq_len=model.max_seq_len,
        # The name that vLLM reads.
        max_position_embeddings=model.max_seq_len,
        tied_embeddings=model.tie_embeddings,
        moe=moe,
        yarn=_yarn(rope) if isinstance(rope, config.YarnRope) else None,
        llama_4_scaling=scaling,
    )
    # What is written must be read back as the same mathematics, also by later versions of this file.
    assert _model(params) == as_written(model), params
    return params.model_dump(exclude_none=True, exclude={"hidden_sliding_window"})


def _yarn(rope: config.YarnRope) -> Yarn:
    """Convert the section `rope`; Mistral's alpha and beta are YaRN's beta_slow and beta_fast."""
    return Yarn(
        factor=float(rope.factor),
        original_max_position_embeddings=rope.original_max_seq_len,
        alpha=float(rope.beta_slow),
        beta=float(rope.beta_fast),
        apply_scale=_applies_scale(rope),
    )


def _applies_scale(rope: config.YarnRope) -> bool:
    """Return whether cos and sin are scaled; raises ValueError for two mscales that params.json cannot express."""
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
        mscale = 0.0 if _applies_scale(rope) else 1.0
        rope = rope.model_copy(update={"mscale": mscale, "mscale_all_dim": mscale})
    sparse = isinstance(model.ffn, config.MoeFfn)
    family = config.family_with(config.features(model), sparse=sparse, file_format="mistral")
    stddev = config.Model.model_fields["init_stddev"].default
    return model.model_copy(update={"rope": rope, "family": family, "init_stddev": stddev})

"""The fields of Mistral's `params.json`, with their types.

Readers name and default them: mistral-inference (`args.py`), vLLM (`transformers_utils/configs/mistral.py`) and
mistral-finetune.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_train.config import NonNegative, Positive, PositiveFloat


class Moe(BaseModel):
    """The experts of a sparse model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_experts: Positive
    num_experts_per_tok: Positive
    expert_hidden_dim: Positive | None = None
    """Width of an expert; None: `hidden_dim`, which otherwise is the width of dense layers."""
    first_k_dense_replace: NonNegative = 0
    """Number of dense first layers."""
    num_shared_experts: NonNegative = 0
    routed_scale: PositiveFloat = 1.0
    """Factor on the weights of the chosen experts."""
    # Only one value of each of these is supported.
    route_every_n: Literal[1] = 1
    num_expert_groups: Literal[1] = 1
    num_expert_groups_per_tok: Literal[1] = 1
    renorm_strategy: Literal["WEIGHTS"] = "WEIGHTS"
    use_load_balancing_bias: Literal[False] = False
    # These say how Mistral trained the model, and do not affect what it computes.
    expert_parallel: int | None = None
    expert_model_parallel: int | None = None


class Yarn(BaseModel):
    """YaRN's settings.

    `alpha` and `beta` are the numbers of rotations at which interpolation is full and at which it ends. With `apply_scale`, cos and
    sin are multiplied by 0.1 log(factor) + 1; in multi-head latent attention, it is instead the scores that are multiplied by the
    square of that.
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
    q_lora_rank: Positive | None = None
    """This and the four sizes below belong to multi-head latent attention, and are all stated or none."""
    kv_lora_rank: Positive | None = None
    qk_rope_head_dim: Positive | None = None
    qk_nope_head_dim: Positive | None = None
    v_head_dim: Positive | None = None
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

    @property
    def has_latents(self) -> bool:
        """Whether the fields describe multi-head latent attention."""
        return any(getattr(self, key) is not None for key in LATENT_SIZES)


LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
"""Fields of the sizes of multi-head latent attention."""

"""What Hugging Face's files of a model with latent attention must contain, stated a second time for the proof alone.

Rotary pairs are adjacent in the files and in the model alike, so nothing is permuted.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_train import config
from moe_train.proof.expected_tensor import ExpectedTensor, Part, as_is, layers_of, one, outputs_last, outputs_one


def latent_tensors(model: config.Model, a: config.MultiHeadLatentAttention, *, in_memory: bool = False) -> Iterator[ExpectedTensor]:
    """Yield the tensors of transformers' `Mistral4ForCausalLM` and `DeepseekV3ForCausalLM`.

    Args:
        model: the architecture.
        a: its attention.
        in_memory: whether experts are joined in any case, as transformers has them in memory, or only where files have them so.
    """
    D = model.model_dim
    V = model.vocab_size
    assert isinstance(model.ffn, config.MoeFfn)
    dense = model.ffn.dense_layers
    yield one("model.embed_tokens.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in layers_of(model):
        name = f"model.layers.{layer}."
        yield one(f"{name}input_layernorm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        yield from _attention(f"{name}self_attn.", f"{path}attention.", r, a, D)
        yield one(f"{name}post_attention_layernorm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        if dense is not None and layer < dense.count:
            yield from _swiglu(f"{name}mlp.", f"{path}ffn.", (r,), D, dense.ffn_dim)
        elif in_memory or model.family == "mistral4":
            yield from _fused_experts(f"{name}mlp.", f"{path}ffn.", r, model.ffn, D)
        else:
            yield from _separate_experts(f"{name}mlp.", f"{path}ffn.", r, model.ffn, D)
    yield one("model.norm.weight", (D,), "final_norm.scale", (), as_is)
    if not model.tie_embeddings:
        yield one("lm_head.weight", (V, D), "head.weight", (), as_is)


def _attention(name: str, path: str, r: int, a: config.MultiHeadLatentAttention, D: int) -> Iterator[ExpectedTensor]:
    N = a.num_heads
    R = a.kv_lora_rank
    query_dims = a.qk_nope_head_dim + a.qk_rope_head_dim
    if a.q_lora_rank is None:
        yield one(f"{name}q_proj.weight", (N * query_dims, D), f"{path}q_proj.weight", (r,), outputs_last)
    else:
        Q = a.q_lora_rank
        yield one(f"{name}q_a_proj.weight", (Q, D), f"{path}q_a_proj.weight", (r,), outputs_last)
        yield one(f"{name}q_a_layernorm.weight", (Q,), f"{path}q_a_norm.scale", (r,), as_is)
        yield one(f"{name}q_b_proj.weight", (N * query_dims, Q), f"{path}q_b_proj.weight", (r,), outputs_last)
    compressed = R + a.qk_rope_head_dim
    yield one(f"{name}kv_a_proj_with_mqa.weight", (compressed, D), f"{path}kv_a_proj.weight", (r,), outputs_last)
    yield one(f"{name}kv_a_layernorm.weight", (R,), f"{path}kv_a_norm.scale", (r,), as_is)
    expanded = N * (a.qk_nope_head_dim + a.v_head_dim)
    yield one(f"{name}kv_b_proj.weight", (expanded, R), f"{path}kv_b_proj.weight", (r,), outputs_last)
    yield one(f"{name}o_proj.weight", (D, N * a.v_head_dim), f"{path}o_proj.weight", (r,), outputs_one)


def _swiglu(name: str, path: str, lead: tuple[int, ...], D: int, F: int) -> Iterator[ExpectedTensor]:
    for part, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        yield one(f"{name}{part}_proj.weight", shape, f"{path}{part}_proj.weight", lead, outputs_last)


def _router_and_shared(name: str, path: str, r: int, ffn: config.MoeFfn, D: int) -> Iterator[ExpectedTensor]:
    E = ffn.num_experts
    yield one(f"{name}gate.weight", (E, D), f"{path}router.weight", (r,), outputs_last)
    if ffn.router.bias:
        yield one(f"{name}gate.e_score_correction_bias", (E,), f"{path}router.bias", (r,), as_is)
    yield from _swiglu(f"{name}shared_experts.", f"{path}shared.", (r,), D, ffn.num_shared_experts * ffn.ffn_dim)


def _fused_experts(name: str, path: str, r: int, ffn: config.MoeFfn, D: int) -> Iterator[ExpectedTensor]:
    """Yield the tensors of a sparse layer whose experts are stacked, with the rows of gate before those of up."""
    E = ffn.num_experts
    F = ffn.ffn_dim
    yield from _router_and_shared(name, path, r, ffn, D)
    gate_up: list[Part] = []
    for e in range(E):
        gate_up.append(Part(f"{path}gate_proj.weight", (r, e), outputs_last))
        gate_up.append(Part(f"{path}up_proj.weight", (r, e), outputs_last))
    yield ExpectedTensor(f"{name}experts.gate_up_proj", (E, 2 * F, D), tuple(gate_up))
    down = tuple(Part(f"{path}down_proj.weight", (r, e), outputs_last) for e in range(E))
    yield ExpectedTensor(f"{name}experts.down_proj", (E, D, F), down)


def _separate_experts(name: str, path: str, r: int, ffn: config.MoeFfn, D: int) -> Iterator[ExpectedTensor]:
    yield from _router_and_shared(name, path, r, ffn, D)
    for e in range(ffn.num_experts):
        yield from _swiglu(f"{name}experts.{e}.", f"{path}", (r, e), D, ffn.ffn_dim)

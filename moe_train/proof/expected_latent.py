"""What Mistral's and llama.cpp's files of a model with latent attention must contain, stated a second time for the proof alone.

Names and shapes are those of vLLM (`mistral_large_3.py`) and llama.cpp (`deepseek2.cpp`). Nothing here comes from `weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from moe_train import config
from moe_train.proof.expected_tensor import ExpectedTensor, Part, as_is, layers_of, one, outputs_last, outputs_one


def keys_of_heads(w: np.ndarray, nope: int) -> np.ndarray:
    """Turn (R, heads, nope + v) into the first `nope` dims of each head, (heads * R, nope)."""
    return w[:, :, :nope].transpose(1, 0, 2).reshape(-1, nope)


def values_of_heads(w: np.ndarray, nope: int) -> np.ndarray:
    """Turn (in, heads, nope + v) into the last dims of each head, (heads * v, in)."""
    return outputs_last(w[:, :, nope:])


def mistral_tensors(model: config.Model, a: config.MultiHeadLatentAttention) -> Iterator[ExpectedTensor]:
    """Yield the tensors of consolidated.safetensors."""
    D = model.model_dim
    V = model.vocab_size
    N = a.num_heads
    Q = a.q_lora_rank or 0
    R = a.kv_lora_rank
    H = a.qk_nope_head_dim + a.qk_rope_head_dim
    ffn = model.ffn
    assert isinstance(ffn, config.MoeFfn)  # no family has latents without experts
    yield one("tok_embeddings.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in layers_of(model):
        name = f"layers.{layer}."
        attention = f"{path}attention."
        yield one(f"{name}attention_norm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        # Nothing is permuted here, in contrast to wq and wk of other models.
        yield one(f"{name}attention.wq_a.weight", (Q, D), f"{attention}q_a_proj.weight", (r,), outputs_last)
        yield one(f"{name}attention.q_a_norm.weight", (Q,), f"{attention}q_a_norm.scale", (r,), as_is)
        yield one(f"{name}attention.wq_b.weight", (N * H, Q), f"{attention}q_b_proj.weight", (r,), outputs_last)
        shape = (R + a.qk_rope_head_dim, D)
        yield one(f"{name}attention.wkv_a_with_mqa.weight", shape, f"{attention}kv_a_proj.weight", (r,), outputs_last)
        yield one(f"{name}attention.kv_a_norm.weight", (R,), f"{attention}kv_a_norm.scale", (r,), as_is)
        shape = (N * (a.qk_nope_head_dim + a.v_head_dim), R)
        yield one(f"{name}attention.wkv_b.weight", shape, f"{attention}kv_b_proj.weight", (r,), outputs_last)
        yield one(f"{name}attention.wo.weight", (D, N * a.v_head_dim), f"{attention}o_proj.weight", (r,), outputs_one)
        yield one(f"{name}ffn_norm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        if ffn.dense_layers is not None and layer < ffn.dense_layers.count:
            yield from _mistral_swiglu(f"{name}feed_forward.", D, ffn.dense_layers.ffn_dim, f"{path}ffn.", (r,))
            continue
        yield one(f"{name}gate.weight", (ffn.num_experts, D), f"{path}ffn.router.weight", (r,), outputs_last)
        if ffn.num_shared_experts:
            width = ffn.num_shared_experts * ffn.ffn_dim
            yield from _mistral_swiglu(f"{name}shared_experts.", D, width, f"{path}ffn.shared.", (r,))
        for e in range(ffn.num_experts):
            yield from _mistral_swiglu(f"{name}experts.{e}.", D, ffn.ffn_dim, f"{path}ffn.", (r, e))
    yield one("norm.weight", (D,), "final_norm.scale", (), as_is)
    if not model.tie_embeddings:
        yield one("output.weight", (V, D), "head.weight", (), as_is)


def _mistral_swiglu(name: str, D: int, F: int, path: str, lead: tuple[int, ...]) -> Iterator[ExpectedTensor]:
    """Yield w1 (gate), w2 (down) and w3 (up) of width F."""
    yield one(f"{name}w1.weight", (F, D), f"{path}gate_proj.weight", lead, outputs_last)
    yield one(f"{name}w2.weight", (D, F), f"{path}down_proj.weight", lead, outputs_last)
    yield one(f"{name}w3.weight", (F, D), f"{path}up_proj.weight", lead, outputs_last)


def gguf_tensors(model: config.Model, a: config.MultiHeadLatentAttention) -> Iterator[ExpectedTensor]:
    """Yield the tensors of a GGUF file, in llama.cpp's absorbed form of the attention."""
    D = model.model_dim
    V = model.vocab_size
    ffn = model.ffn
    assert isinstance(ffn, config.MoeFfn)  # no family has latents without experts
    E = ffn.num_experts
    yield one("token_embd.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in layers_of(model):
        name = f"blk.{layer}."
        yield one(f"{name}attn_norm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        yield from _gguf_attention(model, a, name, f"{path}attention.", r)
        yield one(f"{name}ffn_norm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        if ffn.dense_layers is not None and layer < ffn.dense_layers.count:
            for part, shape in _gguf_shapes(D, ffn.dense_layers.ffn_dim).items():
                yield one(f"{name}ffn_{part}.weight", shape, f"{path}ffn.{part}_proj.weight", (r,), outputs_last)
            continue
        yield one(f"{name}ffn_gate_inp.weight", (E, D), f"{path}ffn.router.weight", (r,), outputs_last)
        if ffn.router.bias:
            yield one(f"{name}exp_probs_b.bias", (E,), f"{path}ffn.router.bias", (r,), as_is)
        if ffn.num_shared_experts:
            for part, shape in _gguf_shapes(D, ffn.num_shared_experts * ffn.ffn_dim).items():
                yield one(f"{name}ffn_{part}_shexp.weight", shape, f"{path}ffn.shared.{part}_proj.weight", (r,), outputs_last)
        for part, shape in _gguf_shapes(D, ffn.ffn_dim).items():
            parts = tuple(Part(f"{path}ffn.{part}_proj.weight", (r, e), outputs_last) for e in range(E))
            yield ExpectedTensor(f"{name}ffn_{part}_exps.weight", (E, *shape), parts)
    yield one("output_norm.weight", (D,), "final_norm.scale", (), as_is)
    if not model.tie_embeddings:
        yield one("output.weight", (V, D), "head.weight", (), as_is)


def _gguf_attention(
    model: config.Model, a: config.MultiHeadLatentAttention, name: str, path: str, r: int
) -> Iterator[ExpectedTensor]:
    """Yield the tensors of a layer's attention."""
    D = model.model_dim
    N = a.num_heads
    Q = a.q_lora_rank or 0
    R = a.kv_lora_rank
    nope = a.qk_nope_head_dim
    yield one(f"{name}attn_q_a.weight", (Q, D), f"{path}q_a_proj.weight", (r,), outputs_last)
    yield one(f"{name}attn_q_a_norm.weight", (Q,), f"{path}q_a_norm.scale", (r,), as_is)
    yield one(f"{name}attn_q_b.weight", (N * (nope + a.qk_rope_head_dim), Q), f"{path}q_b_proj.weight", (r,), outputs_last)
    yield one(f"{name}attn_kv_a_mqa.weight", (R + a.qk_rope_head_dim, D), f"{path}kv_a_proj.weight", (r,), outputs_last)
    yield one(f"{name}attn_kv_a_norm.weight", (R,), f"{path}kv_a_norm.scale", (r,), as_is)
    # The keys' part is stored as (heads, R, nope): its rows are inputs of kv_b.
    keys = Part(f"{path}kv_b_proj.weight", (r,), partial(keys_of_heads, nope=nope), mixes_factors=True)
    yield ExpectedTensor(f"{name}attn_k_b.weight", (N, R, nope), (keys,))
    values = partial(values_of_heads, nope=nope)
    yield one(f"{name}attn_v_b.weight", (N, a.v_head_dim, R), f"{path}kv_b_proj.weight", (r,), values)
    yield one(f"{name}attn_output.weight", (D, N * a.v_head_dim), f"{path}o_proj.weight", (r,), outputs_one)


def _gguf_shapes(D: int, F: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of gate, up and down projections of width F."""
    return {"gate": (F, D), "up": (F, D), "down": (D, F)}

"""What the files of each layout must contain, stated a second time and plainly, for the proof alone.

Nothing here comes from `weights.names`, so that a mistake in its tables is found. Names and shapes are those of the layouts' own
tools. Each matrix states the numpy function that turns the model's array, (in dims…, out dims…), into the file's, (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from moe_train import config

ToFile = Callable[[np.ndarray], np.ndarray]
"""Turns a matrix of the model into the file's."""
ModelLayout = Literal["hf", "mistral", "gguf"]
"""Layouts of files of whole models."""
AdapterLayout = Literal["peft", "mistral-lora", "gguf-lora"]
"""Layouts of files of adapters alone."""


class Part(NamedTuple):
    """One matrix or vector of the model inside a tensor of the file."""

    path: str
    lead: tuple[int, ...]
    """Entry in the stacked array: (), (repeat,) or (repeat, expert)."""
    to_file: ToFile
    """Turns the model's matrix into the file's. It also applies to B of an adapter, whose in dim is the rank."""


class ExpectedTensor(NamedTuple):
    """A tensor that the file must have."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    """One part, or several stacked on the tensor's first dim."""

    @property
    def module(self) -> str:
        """Path of the module in the model, taken from the first part."""
        return self.parts[0].path.removesuffix(".weight")


def as_is(w: np.ndarray) -> np.ndarray:
    """Return the array unchanged."""
    return w


def outputs_last(w: np.ndarray) -> np.ndarray:
    """Turn (in, out dims…) into (out, in)."""
    return w.reshape(w.shape[0], -1).T


def outputs_one(w: np.ndarray) -> np.ndarray:
    """Turn (in dims…, out) into (out, in)."""
    return w.reshape(-1, w.shape[-1]).T


def interleaved(w: np.ndarray) -> np.ndarray:
    """Turn (in, heads, head_dim) into (out, in) with the two numbers of a rotary pair adjacent instead of half a head apart."""
    d, n, h = w.shape
    return outputs_last(w).reshape(n, 2, h // 2, d).transpose(0, 2, 1, 3).reshape(n * h, d)


def model_tensors(layout: ModelLayout, model: config.Model) -> list[ExpectedTensor]:
    """List every tensor that a whole model has in this layout."""
    match layout:
        case "hf":
            return list(_hugging_face(model))
        case "mistral":
            return list(_mistral(model))
        case "gguf":
            return list(_gguf(model))


def adapter_names(layout: AdapterLayout, weight: str) -> tuple[str, str]:
    """Return the names of A (rank, in) and B (out, rank) of the adapter for a weight of that layout's model."""
    stem = weight.removesuffix(".weight")
    match layout:
        case "peft" if weight.endswith("embed_tokens.weight"):
            return f"base_model.model.{stem}.lora_embedding_A", f"base_model.model.{stem}.lora_embedding_B"
        case "peft":
            return f"base_model.model.{stem}.lora_A.weight", f"base_model.model.{stem}.lora_B.weight"
        case "mistral-lora":
            return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        case "gguf-lora":
            return f"{weight}.lora_a", f"{weight}.lora_b"


def in_wrapper(tensor: ExpectedTensor) -> ExpectedTensor:
    """Return the tensor under the name that transformers gives to it inside a vision wrapper."""
    name = tensor.name
    if name.startswith("model."):  # the head is outside of the text model there
        name = "model.language_model." + name.removeprefix("model.")
    return tensor._replace(name=name)


def full_weight_names(layout: AdapterLayout, weight: str, tied: bool) -> list[str]:
    """Return the names, in adapter files, of a weight that was trained in full.

    A tied table of embeddings has two names in PEFT's files, as embedding and as head.
    """
    if layout != "peft":
        return [weight]
    # PEFT saves modules under their names in memory, which transformers 5 has changed for routers.
    name = f"base_model.model.{weight.replace('.block_sparse_moe.gate.', '.mlp.gate.')}"
    if tied and "embed_tokens" in weight:
        return [name, "base_model.model.lm_head.weight"]
    return [name]


MODEL_LAYOUT_OF: dict[AdapterLayout, ModelLayout] = {"peft": "hf", "mistral-lora": "mistral", "gguf-lora": "gguf"}
"""The model layout whose names an adapter layout uses."""


def _one(name: str, shape: tuple[int, ...], path: str, lead: tuple[int, ...], to_file: ToFile) -> ExpectedTensor:
    return ExpectedTensor(name, shape, (Part(path, lead, to_file),))


def _layers(model: config.Model) -> Iterator[tuple[int, str, int]]:
    """Yield (layer, prefix of its paths, entry in their arrays); layer 5 of a period of 2 is entry 2 of `layers.1`.

    This is computed here rather than by the model's code: the second reader must not share the writer's assumptions about where
    layers are stored.
    """
    period = len(model.attention.windows)
    # The first dense layers of a sparse model are in a stack of their own.
    num_dense = 0
    if isinstance(model.ffn, config.MoeFfn) and model.ffn.dense_layers is not None:
        num_dense = model.ffn.dense_layers.count
    for layer in range(model.num_layers):
        is_second_stack = 0 < num_dense <= layer
        layer_of_stack = layer - num_dense if is_second_stack else layer
        entry, place = divmod(layer_of_stack, period)
        yield layer, f"stacks.{int(is_second_stack)}.layers.{place}.", entry


def _hugging_face(model: config.Model) -> Iterator[ExpectedTensor]:
    """Yield the tensors of Hugging Face's layout."""
    D = model.model_dim
    V = model.vocab_size
    F = model.ffn.ffn_dim
    a = config.require_grouped_query(model.attention, "the proof")
    Q = a.num_heads * a.head_dim
    KV = a.num_kv_heads * a.head_dim
    yield _one("model.embed_tokens.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in _layers(model):
        name = f"model.layers.{layer}."
        yield _one(f"{name}input_layernorm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        yield _one(f"{name}self_attn.q_proj.weight", (Q, D), f"{path}attention.q_proj.weight", (r,), outputs_last)
        yield _one(f"{name}self_attn.k_proj.weight", (KV, D), f"{path}attention.k_proj.weight", (r,), outputs_last)
        yield _one(f"{name}self_attn.v_proj.weight", (KV, D), f"{path}attention.v_proj.weight", (r,), outputs_last)
        yield _one(f"{name}self_attn.o_proj.weight", (D, Q), f"{path}attention.o_proj.weight", (r,), outputs_one)
        yield _one(f"{name}post_attention_layernorm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        if isinstance(model.ffn, config.DenseFfn):
            yield _one(f"{name}mlp.gate_proj.weight", (F, D), f"{path}ffn.gate_proj.weight", (r,), outputs_last)
            yield _one(f"{name}mlp.up_proj.weight", (F, D), f"{path}ffn.up_proj.weight", (r,), outputs_last)
            yield _one(f"{name}mlp.down_proj.weight", (D, F), f"{path}ffn.down_proj.weight", (r,), outputs_last)
            continue
        # transformers 4's names, a tensor for each expert: readers of versions 4 and 5 load them. w1 is gate, w2 down, w3 up.
        moe = f"{name}block_sparse_moe."
        yield _one(f"{moe}gate.weight", (model.ffn.num_experts, D), f"{path}ffn.router.weight", (r,), outputs_last)
        for e in range(model.ffn.num_experts):
            yield _one(f"{moe}experts.{e}.w1.weight", (F, D), f"{path}ffn.gate_proj.weight", (r, e), outputs_last)
            yield _one(f"{moe}experts.{e}.w2.weight", (D, F), f"{path}ffn.down_proj.weight", (r, e), outputs_last)
            yield _one(f"{moe}experts.{e}.w3.weight", (F, D), f"{path}ffn.up_proj.weight", (r, e), outputs_last)
    yield _one("model.norm.weight", (D,), "final_norm.scale", (), as_is)
    if not model.tie_embeddings:
        yield _one("lm_head.weight", (V, D), "head.weight", (), as_is)


def _mistral(model: config.Model) -> Iterator[ExpectedTensor]:
    """Yield the tensors of Mistral's own layout."""
    D = model.model_dim
    V = model.vocab_size
    F = model.ffn.ffn_dim
    a = config.require_grouped_query(model.attention, "the proof")
    Q = a.num_heads * a.head_dim
    KV = a.num_kv_heads * a.head_dim
    yield _one("tok_embeddings.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in _layers(model):
        name = f"layers.{layer}."
        yield _one(f"{name}attention_norm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        # Mistral's own files have the two numbers of a rotary pair side by side; only q and k are rotated.
        yield _one(f"{name}attention.wq.weight", (Q, D), f"{path}attention.q_proj.weight", (r,), interleaved)
        yield _one(f"{name}attention.wk.weight", (KV, D), f"{path}attention.k_proj.weight", (r,), interleaved)
        yield _one(f"{name}attention.wv.weight", (KV, D), f"{path}attention.v_proj.weight", (r,), outputs_last)
        yield _one(f"{name}attention.wo.weight", (D, Q), f"{path}attention.o_proj.weight", (r,), outputs_one)
        yield _one(f"{name}ffn_norm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        experts: list[tuple[str, tuple[int, ...]]] = [(f"{name}feed_forward.", (r,))]
        if isinstance(model.ffn, config.MoeFfn):
            E = model.ffn.num_experts
            yield _one(f"{name}feed_forward.gate.weight", (E, D), f"{path}ffn.router.weight", (r,), outputs_last)
            experts = [(f"{name}feed_forward.experts.{e}.", (r, e)) for e in range(E)]
        for expert, lead in experts:
            yield _one(f"{expert}w1.weight", (F, D), f"{path}ffn.gate_proj.weight", lead, outputs_last)
            yield _one(f"{expert}w2.weight", (D, F), f"{path}ffn.down_proj.weight", lead, outputs_last)
            yield _one(f"{expert}w3.weight", (F, D), f"{path}ffn.up_proj.weight", lead, outputs_last)
    yield _one("norm.weight", (D,), "final_norm.scale", (), as_is)
    if not model.tie_embeddings:
        yield _one("output.weight", (V, D), "head.weight", (), as_is)


def _gguf(model: config.Model) -> Iterator[ExpectedTensor]:
    """Yield the tensors of llama.cpp's layout."""
    D = model.model_dim
    V = model.vocab_size
    F = model.ffn.ffn_dim
    a = config.require_grouped_query(model.attention, "the proof")
    Q = a.num_heads * a.head_dim
    KV = a.num_kv_heads * a.head_dim
    yield _one("token_embd.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in _layers(model):
        name = f"blk.{layer}."
        yield _one(f"{name}attn_norm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        # llama.cpp has q and k in the order of Mistral's own files, not in Hugging Face's.
        yield _one(f"{name}attn_q.weight", (Q, D), f"{path}attention.q_proj.weight", (r,), interleaved)
        yield _one(f"{name}attn_k.weight", (KV, D), f"{path}attention.k_proj.weight", (r,), interleaved)
        yield _one(f"{name}attn_v.weight", (KV, D), f"{path}attention.v_proj.weight", (r,), outputs_last)
        yield _one(f"{name}attn_output.weight", (D, Q), f"{path}attention.o_proj.weight", (r,), outputs_one)
        yield _one(f"{name}ffn_norm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        if isinstance(model.ffn, config.DenseFfn):
            for part, shape in shapes.items():
                yield _one(f"{name}ffn_{part}.weight", shape, f"{path}ffn.{part}_proj.weight", (r,), outputs_last)
            continue
        E = model.ffn.num_experts
        yield _one(f"{name}ffn_gate_inp.weight", (E, D), f"{path}ffn.router.weight", (r,), outputs_last)
        for part, shape in shapes.items():
            # llama.cpp stacks the matrices of all experts in one tensor.
            parts = tuple(Part(f"{path}ffn.{part}_proj.weight", (r, e), outputs_last) for e in range(E))
            yield ExpectedTensor(f"{name}ffn_{part}_exps.weight", (E, *shape), parts)
    yield _one("output_norm.weight", (D,), "final_norm.scale", (), as_is)
    if not model.tie_embeddings:
        yield _one("output.weight", (V, D), "head.weight", (), as_is)

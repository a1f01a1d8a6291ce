"""What the files of each layout must contain, stated a second time and plainly, for the proof alone.

Nothing here comes from `weights.names`, so that a mistake in its tables is found. Names and shapes are those of the layouts' own
tools. Each matrix states the numpy function that turns the model's array, (in dims…, out dims…), into the file's, (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from moe_train import config
from moe_train.proof import expected_hugging_face, expected_latent
from moe_train.proof.expected_tensor import ExpectedTensor, Part, as_is, interleaved, layers_of, one, outputs_last, outputs_one

ModelLayout = Literal["hf", "mistral", "gguf"]
"""Layouts of files of whole models."""
AdapterLayout = Literal["peft", "mistral-lora", "gguf-lora"]
"""Layouts of files of adapters alone."""


def model_tensors(layout: ModelLayout, model: config.Model) -> list[ExpectedTensor]:
    """List every tensor that a whole model has in this layout."""
    match layout:
        case "hf" if isinstance(model.attention, config.MultiHeadLatentAttention):
            return list(expected_hugging_face.latent_tensors(model, model.attention))
        case "hf":
            return list(_hugging_face(model))
        case "mistral" if isinstance(model.attention, config.MultiHeadLatentAttention):
            return list(expected_latent.mistral_tensors(model, model.attention))
        case "mistral":
            return list(_mistral(model))
        case "gguf" if isinstance(model.attention, config.MultiHeadLatentAttention):
            return list(expected_latent.gguf_tensors(model, model.attention))
        case "gguf":
            return list(_gguf(model))


def adapted_tensors(layout: AdapterLayout, model: config.Model) -> list[ExpectedTensor]:
    """List the weights of a model as the tools of an adapter's layout have them."""
    if layout == "peft" and isinstance(model.attention, config.MultiHeadLatentAttention):
        return list(expected_hugging_face.latent_tensors(model, model.attention, in_memory=True))
    return model_tensors(MODEL_LAYOUT_OF[layout], model)


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


def _hugging_face(model: config.Model) -> Iterator[ExpectedTensor]:
    """Yield the tensors of Hugging Face's layout."""
    D = model.model_dim
    V = model.vocab_size
    F = model.ffn.ffn_dim
    a = config.require_grouped_query(model.attention, "the proof")
    Q = a.num_heads * a.head_dim
    KV = a.num_kv_heads * a.head_dim
    yield one("model.embed_tokens.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in layers_of(model):
        name = f"model.layers.{layer}."
        yield one(f"{name}input_layernorm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        yield one(f"{name}self_attn.q_proj.weight", (Q, D), f"{path}attention.q_proj.weight", (r,), outputs_last)
        yield one(f"{name}self_attn.k_proj.weight", (KV, D), f"{path}attention.k_proj.weight", (r,), outputs_last)
        yield one(f"{name}self_attn.v_proj.weight", (KV, D), f"{path}attention.v_proj.weight", (r,), outputs_last)
        yield one(f"{name}self_attn.o_proj.weight", (D, Q), f"{path}attention.o_proj.weight", (r,), outputs_one)
        yield one(f"{name}post_attention_layernorm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        if isinstance(model.ffn, config.DenseFfn):
            yield one(f"{name}mlp.gate_proj.weight", (F, D), f"{path}ffn.gate_proj.weight", (r,), outputs_last)
            yield one(f"{name}mlp.up_proj.weight", (F, D), f"{path}ffn.up_proj.weight", (r,), outputs_last)
            yield one(f"{name}mlp.down_proj.weight", (D, F), f"{path}ffn.down_proj.weight", (r,), outputs_last)
            continue
        # transformers 4's names, a tensor for each expert: readers of versions 4 and 5 load them. w1 is gate, w2 down, w3 up.
        moe = f"{name}block_sparse_moe."
        yield one(f"{moe}gate.weight", (model.ffn.num_experts, D), f"{path}ffn.router.weight", (r,), outputs_last)
        for e in range(model.ffn.num_experts):
            yield one(f"{moe}experts.{e}.w1.weight", (F, D), f"{path}ffn.gate_proj.weight", (r, e), outputs_last)
            yield one(f"{moe}experts.{e}.w2.weight", (D, F), f"{path}ffn.down_proj.weight", (r, e), outputs_last)
            yield one(f"{moe}experts.{e}.w3.weight", (F, D), f"{path}ffn.up_proj.weight", (r, e), outputs_last)
    yield one("model.norm.weight", (D,), "final_norm.scale", (), as_is)
    if model.scores is not None:
        yield one("score.weight", (model.scores.num_outputs, D), "head.weight", (), as_is)
    elif not model.tie_embeddings:
        yield one("lm_head.weight", (V, D), "head.weight", (), as_is)


def _mistral(model: config.Model) -> Iterator[ExpectedTensor]:
    """Yield the tensors of Mistral's own layout."""
    D = model.model_dim
    V = model.vocab_size
    F = model.ffn.ffn_dim
    a = config.require_grouped_query(model.attention, "the proof")
    Q = a.num_heads * a.head_dim
    KV = a.num_kv_heads * a.head_dim
    yield one("tok_embeddings.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in layers_of(model):
        name = f"layers.{layer}."
        yield one(f"{name}attention_norm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        # Mistral's own files have the two numbers of a rotary pair side by side; only q and k are rotated.
        yield one(f"{name}attention.wq.weight", (Q, D), f"{path}attention.q_proj.weight", (r,), interleaved)
        yield one(f"{name}attention.wk.weight", (KV, D), f"{path}attention.k_proj.weight", (r,), interleaved)
        yield one(f"{name}attention.wv.weight", (KV, D), f"{path}attention.v_proj.weight", (r,), outputs_last)
        yield one(f"{name}attention.wo.weight", (D, Q), f"{path}attention.o_proj.weight", (r,), outputs_one)
        yield one(f"{name}ffn_norm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        experts: list[tuple[str, tuple[int, ...]]] = [(f"{name}feed_forward.", (r,))]
        if isinstance(model.ffn, config.MoeFfn):
            E = model.ffn.num_experts
            yield one(f"{name}feed_forward.gate.weight", (E, D), f"{path}ffn.router.weight", (r,), outputs_last)
            experts = [(f"{name}feed_forward.experts.{e}.", (r, e)) for e in range(E)]
        for expert, lead in experts:
            yield one(f"{expert}w1.weight", (F, D), f"{path}ffn.gate_proj.weight", lead, outputs_last)
            yield one(f"{expert}w2.weight", (D, F), f"{path}ffn.down_proj.weight", lead, outputs_last)
            yield one(f"{expert}w3.weight", (F, D), f"{path}ffn.up_proj.weight", lead, outputs_last)
    yield one("norm.weight", (D,), "final_norm.scale", (), as_is)
    if not model.tie_embeddings:
        yield one("output.weight", (V, D), "head.weight", (), as_is)


def _gguf(model: config.Model) -> Iterator[ExpectedTensor]:
    """Yield the tensors of llama.cpp's layout."""
    D = model.model_dim
    V = model.vocab_size
    F = model.ffn.ffn_dim
    a = config.require_grouped_query(model.attention, "the proof")
    Q = a.num_heads * a.head_dim
    KV = a.num_kv_heads * a.head_dim
    yield one("token_embd.weight", (V, D), "embed.weight", (), as_is)
    for layer, path, r in layers_of(model):
        name = f"blk.{layer}."
        yield one(f"{name}attn_norm.weight", (D,), f"{path}attention_norm.scale", (r,), as_is)
        # llama.cpp has q and k in the order of Mistral's own files, not in Hugging Face's.
        yield one(f"{name}attn_q.weight", (Q, D), f"{path}attention.q_proj.weight", (r,), interleaved)
        yield one(f"{name}attn_k.weight", (KV, D), f"{path}attention.k_proj.weight", (r,), interleaved)
        yield one(f"{name}attn_v.weight", (KV, D), f"{path}attention.v_proj.weight", (r,), outputs_last)
        yield one(f"{name}attn_output.weight", (D, Q), f"{path}attention.o_proj.weight", (r,), outputs_one)
        yield one(f"{name}ffn_norm.weight", (D,), f"{path}ffn_norm.scale", (r,), as_is)
        shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        if isinstance(model.ffn, config.DenseFfn):
            for part, shape in shapes.items():
                yield one(f"{name}ffn_{part}.weight", shape, f"{path}ffn.{part}_proj.weight", (r,), outputs_last)
            continue
        E = model.ffn.num_experts
        yield one(f"{name}ffn_gate_inp.weight", (E, D), f"{path}ffn.router.weight", (r,), outputs_last)
        for part, shape in shapes.items():
            # llama.cpp stacks the matrices of all experts in one tensor.
            parts = tuple(Part(f"{path}ffn.{part}_proj.weight", (r, e), outputs_last) for e in range(E))
            yield ExpectedTensor(f"{name}ffn_{part}_exps.weight", (E, *shape), parts)
    yield one("output_norm.weight", (D,), "final_norm.scale", (), as_is)
    if not model.tie_embeddings:
        yield one("output.weight", (V, D), "head.weight", (), as_is)

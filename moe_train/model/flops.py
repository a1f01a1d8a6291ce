"""Model FLOPs: the floating-point operations that the mathematics of a model asks for.

They exclude everything else that a program computes: recomputation, and the masked half of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, assert_never

import jax
from jaxtyping import Array, Shaped

from moe_train import config
from moe_train.model.paths import ParameterPath


def flops_per_token(
    model: config.Model, seq_len: int, adapters: Mapping[str, Shaped[Array, "..."] | jax.ShapeDtypeStruct] | None = None
) -> float:
    """Return the model FLOPs per token of a training step on rows of `seq_len` tokens.

    Weights: 2 FLOPs per weight that the token passes through in the forward pass, and twice that in the backward pass (gradients
    of input and weight). Of the experts, the chosen and the shared ones count; the head counts once, the embedding lookup does
    not. Attention scores and values: 2 * 2 * N * H per pair of query and visible key (2 * N * (H + W) if values have W dims), also
    times three; a query sees T / 2 keys on average (W - W^2 / 2T with a window W), as if each row were one sequence.

    Args:
        model: model section of the config.
        seq_len: tokens of a row, T.
        adapters: {path: array} of everything that is trained, stacked over layers, if the base weights are frozen: forward and
            input gradient then take 4 per base weight, adapters take 6, and weights that are trained in full take 2 more.
            None or empty for full training.
    """
    D = model.model_dim
    attention = _attention_weights(D, model.attention)
    # The head's product; the embedding is a lookup, without FLOPs.
    base = (model.vocab_size if model.scores is None else model.scores.num_outputs) * D
    keys = 0.0
    for stack in config.stacks(model):
        base += stack.num_layers * (attention + _ffn_weights(D, stack.ffn))
        keys += stack.repeats * sum(_visible_keys(seq_len, window) for window in stack.windows)
    # Scores and weighted values, 2 FLOPs per entry each; the backward pass takes twice the forward pass.
    pairs = 3 * 2 * _pair_entries(model.attention) * keys
    if not adapters:
        return 6 * base + pairs
    trained = 0.0
    for name, x in adapters.items():
        path = ParameterPath.parse(name)
        if not path.is_vision:  # whose products are not those of every token
            trained += _adapter_flops(model, path, x.size)
    return 4 * base + trained + pairs


def flops_of_run(run: config.Run, trained: Mapping[str, Shaped[Array, "..."] | jax.ShapeDtypeStruct] | None = None) -> float:
    """Return the model FLOPs per token of a training step of a resolved run, those of its tower included.

    Args:
        run: the resolved run.
        trained: as `adapters` of `flops_per_token`.
    """
    flops = flops_per_token(run.model, run.train.seq_len, trained)
    if isinstance(run.audio, config.RunAudio):
        return flops + audio_flops(run.audio.encoder, run.model.model_dim, run.audio.chunks_per_row) / run.train.seq_len
    if run.pictures is None:
        return flops
    trained_modules = TrainedVision(run.lora, run.trained_vision)
    of_row = vision_flops(run.pictures.encoder, run.model.model_dim, run.pictures.patches_per_row, trained_modules)
    return flops + of_row / run.train.seq_len


class TrainedVision(NamedTuple):
    """What is trained of a vision tower and its projector."""

    lora: config.Lora | None = None
    patterns: tuple[str, ...] = ()
    """Those of full training (`vision.train`)."""

    def in_full(self, module: str) -> bool:
        """Return whether a module such as `vision.projector.in_proj` is trained in full."""
        if self.lora is not None:
            return self.lora.trains_in_full(module)
        return any(config.names_module(pattern, module) for pattern in self.patterns)

    def rank(self, module: str) -> int:
        """Return the rank of a module's adapter; 0 without one."""
        targets = [] if self.lora is None else self.lora.targets_of(module, routed=False)
        return targets[0].rank if targets else 0


class _Product(NamedTuple):
    """A product with a weight of a vision tower or its projector."""

    module: str
    inputs: int
    outputs: int
    times: float
    """How often it is computed for a row."""


def vision_flops(encoder: config.VisionEncoder, text_dim: int, patches: int, trained: TrainedVision | None = None) -> float:
    """Return the model FLOPs of a vision tower and its projector for the patches of a row.

    Frozen parts before the first one that is trained have a forward pass alone. From there on the gradients of inputs take as much
    again, as do those of weights that are trained in full; adapters take three products more. The room of the row counts as full,
    with pictures of the largest size: how much of it pictures fill depends on the data.

    Args:
        encoder: sizes of the tower.
        text_dim: width of the text model.
        patches: patches that the row has room for.
        trained: what is trained; None for nothing.
    """
    trained = TrainedVision() if trained is None else trained
    D = encoder.tower_dim
    products = list(_products(encoder, text_dim, patches))
    is_trained = [trained.in_full(product.module) or trained.rank(product.module) > 0 for product in products]
    first = is_trained.index(True) if any(is_trained) else len(products)
    if first < len(products) and products[first].module.startswith("vision.tower.layers."):
        first = 1  # gradients pass through all products of all layers but the first
    flops = 0.0
    for i, product in enumerate(products):
        passes = 1 + int(i >= first) + int(trained.in_full(product.module))
        flops += 2 * product.times * product.inputs * product.outputs * passes
        flops += 6 * product.times * trained.rank(product.module) * (product.inputs + product.outputs)
    keys = min(patches, (encoder.max_image_size // encoder.patch_size) ** 2)
    tower_has_gradients = any(product.module.startswith("vision.tower.") for product in products[first:])
    # Scores and weighted values; the backward pass takes twice the forward pass.
    return flops + 2 * patches * encoder.num_layers * 2 * D * keys * (3 if tower_has_gradients else 1)


def _products(encoder: config.VisionEncoder, text_dim: int, patches: int) -> Iterator[_Product]:
    """Yield the products with weights, from the pixels to the features."""
    D = encoder.tower_dim
    F = encoder.ffn_dim
    tokens = patches / encoder.patches_per_token
    yield _Product("vision.tower.patch_proj", encoder.patch_values, D, patches)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield _Product(f"vision.tower.layers.attention.{name}", D, D, patches * encoder.num_layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield _Product(f"vision.tower.layers.ffn.{name}", D, F, patches * encoder.num_layers)
    if encoder.merge_size:
        yield _Product("vision.projector.merge_proj", encoder.patches_per_token * D, D, tokens)
    yield _Product("vision.projector.in_proj", D, text_dim, tokens)
    yield _Product("vision.projector.out_proj", text_dim, text_dim, tokens)


def audio_flops(encoder: config.AudioEncoder, text_dim: int, chunks: int) -> float:
    """Return the model FLOPs of a frozen audio tower and its projector, forward only, for the chunks of a row.

    The room of the row counts as full: how much of it sound fills depends on the data.

    Args:
        encoder: sizes of the tower.
        text_dim: width of the text model.
        chunks: chunks that the row has room for.
    """
    D = encoder.tower_dim
    S = encoder.max_positions
    convolutions = 3 * D * (encoder.frames_per_chunk * encoder.num_mel_bins + S * D)
    layers = encoder.num_layers * S * (4 * D * D + 2 * D * encoder.ffn_dim + 2 * D * S)
    projector = encoder.tokens_per_chunk * (encoder.downsampling * D + text_dim) * text_dim
    return 2.0 * chunks * (convolutions + layers + projector)


def _attention_weights(model_dim: int, attention: config.Attention) -> int:
    """Return the number of weights of a layer's attention; a token passes through all of them."""
    D = model_dim
    a = attention
    match a:
        case config.GroupedQueryAttention():
            # Projections of queries and outputs, and of keys and values.
            return 2 * D * a.num_heads * a.head_dim + 2 * D * a.num_kv_heads * a.head_dim
        case config.MultiHeadLatentAttention():
            query_dims = a.num_heads * a.qk_head_dim
            queries = D * query_dims if a.q_lora_rank is None else a.q_lora_rank * (D + query_dims)
            into_latent = D * (a.kv_lora_rank + a.qk_rope_head_dim)
            from_latent = a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
            return queries + into_latent + from_latent + a.num_heads * a.v_head_dim * D
        case _:
            assert_never(a)


def _pair_entries(attention: config.Attention) -> int:
    """Return the number of products of a query with a key, and of a weight with its value, over all heads."""
    match attention:
        case config.GroupedQueryAttention(num_heads=N, head_dim=H):
            return 2 * N * H
        case config.MultiHeadLatentAttention(num_heads=N):
            return N * (attention.qk_head_dim + attention.v_head_dim)
        case _:
            assert_never(attention)


def _ffn_weights(model_dim: int, ffn: config.Ffn) -> int:
    """Return the number of weights that a token passes through in a layer's feed-forward part."""
    dense = 3 * model_dim * ffn.ffn_dim
    if not isinstance(ffn, config.MoeFfn):
        return dense
    return dense * (ffn.experts_per_token + ffn.num_shared_experts) + model_dim * ffn.num_experts


def _visible_keys(seq_len: int, window: int | None) -> float:
    """Return the number of keys that a query of a row sees on average."""
    if window is None or window >= seq_len:
        return seq_len / 2
    # The first W queries see W / 2 keys on average and the other T - W see W: (W * W / 2 + (T - W) * W) / T.
    return window - window * window / (2 * seq_len)


def _adapter_flops(model: config.Model, path: ParameterPath, size: int) -> float:
    """Return the FLOPs per token of an array that is trained on top of a frozen base."""
    is_lookup = path.is_embedding and path.leaf in ("weight", "lora_a")
    # Lookups, norms and router biases involve no matrix product.
    if is_lookup or path.is_norm or path.is_router_bias:
        return 0.0
    # A token passes through the chosen experts only.
    share = 1.0
    if isinstance(model.ffn, config.MoeFfn) and path.is_expert(model):
        share = model.ffn.experts_per_token / model.ffn.num_experts
    # 4 FLOPs of a weight that is trained in full are in the base's count already; only its own gradient is missing.
    return (6 if path.is_adapter else 2) * size * share

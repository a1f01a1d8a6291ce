"""Device memory that a training step needs, part by part, computed from shapes alone.

State is counted from the arrays themselves. Temporaries are counted at their peak in the backward pass, when gradients exist
too (activations after Korthikanti et al., arXiv:2205.05198, section 4, for the layers of this model). The forward pass and
the loss reuse the space of gradients: this is how XLA:TPU was observed to place its buffers (libtpu of JAX 0.10; the buffer
assignments of two dozen programs, 2 to 32 layers). XLA:GPU pads no weights, casts none ahead, and keeps other arrays of a layer
(`gpu_memory`).
"""

from __future__ import annotations

from typing import NamedTuple

from moe_train import config
from moe_train.model.sharding.collectives import LANES
from moe_train.plan.attention_sizes import attention_sizes
from moe_train.plan.gpu_memory import gpu_layer_bytes
from moe_train.plan.topology import Platform
from moe_train.plan.tower_memory import saved_tower_bytes, tower_bytes
from moe_train.plan.traffic import MicrobatchShape, microbatch_shape
from moe_train.plan.weights import ShardedWeight, WeightLayout, axis_sizes, is_nf4, numbers_per_element
from moe_train.train.logits import chunk_rows
from moe_train.train.objectives.choose import objective_of_run


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: int
    optimizer: int
    """Moments and counters of the optimizer, and the moving average of the weights (`average.name ema`)."""
    batch: int
    gradients: int
    """Gradients, including their sums over microbatches."""
    saved: int
    """Activations that layers keep for the backward pass, and weights that are cast or laid out for all layers at once."""
    layer: int
    """Gathered weights, exchanged rows and products of the one layer being computed, at its peak."""
    loss: int
    """What computing the loss takes beyond gradients and layer, whose space it reuses; or, if more, what the gradients of embedding
    and head take beyond the layer after the backward pass of all layers."""

    @property
    def total(self) -> int:
        """Peak bytes of a step."""
        return sum(self)

    @property
    def kept(self) -> int:
        """Bytes that persist from step to step."""
        return self.parameters + self.optimizer + self.batch


def memory(run: config.Run, layout: WeightLayout, platform: Platform = "tpu") -> Memory:
    """Model the memory of a step of a resolved run whose mesh has no -1.

    Args:
        run: the resolved run.
        layout: the weights of the run with their shardings.
        platform: the platform that the step is compiled for.
    """
    model = run.model
    sizes = axis_sizes(run.mesh)
    shape = microbatch_shape(run)
    # Of a whole row, since room for the pictures or sound is that of a row.
    bytes_per_row = sum(array.nbytes for array in objective_of_run(run).batch_type.empty(1, run.train.seq_len))
    M = run.train.microbatches
    stacked = [w for w in layout.weights if w.path.in_layer]
    stacks = config.stacks(model)
    trained = [w for w in layout.weights if w.trainable]

    gradients = sum(_padded_bytes(w, sizes, platform) for w in trained)
    layer_bytes = gpu_layer_bytes if platform == "gpu" else _layer_bytes
    # Layers run one after the other, so only the largest counts.
    layer = max(
        layer_bytes(run, stack.ffn, [w for w in stacked if w.path.stack == i], sizes, shape.in_layer(stack.ffn))
        for i, stack in enumerate(stacks)
    )
    at_loss = _loss_bytes(model, layout, sizes, shape) - gradients - layer
    at_end = _table_gradient_bytes(model, layout, sizes, shape) - layer
    loss = max(0, at_loss, at_end)
    if M > 1:  # the sum so far, in float32, in the same layout
        gradients += sum(_padded_bytes(w, sizes, platform) * 4 // w.itemsize for w in trained)
    return Memory(
        parameters=sum(w.stored_bytes(sizes) for w in layout.weights),
        optimizer=layout.optimizer_bytes + _average_bytes(run, trained, sizes),
        batch=M * shape.tokens * bytes_per_row // run.train.seq_len,
        gradients=gradients,
        saved=_saved_bytes(run, stacked, sizes, shape, platform) + saved_tower_bytes(run, shape),
        layer=max(layer, tower_bytes(run, sizes, shape)),
        loss=loss,
    )


def _average_bytes(run: config.Run, trained: list[ShardedWeight], sizes: dict[str, int]) -> int:
    """Return the bytes of the moving average of the weights; the mean of the last checkpoints is made from files."""
    if not isinstance(run.average, config.ExponentialAverage):
        return 0
    return sum(w.stored_bytes(sizes) for w in trained)


def _saved_bytes(
    run: config.Run, stacked: list[ShardedWeight], sizes: dict[str, int], shape: MicrobatchShape, platform: Platform
) -> int:
    """Return the bytes of what exists for all layers at once: saved activations, and weights that are cast or padded."""
    b = shape.itemsize
    saved = 0
    for stack in config.stacks(run.model):
        saved += stack.repeats * shape.tokens * run.model.model_dim * b  # inputs of each period
        if run.compute.remat == "minimal":
            named = _named_activation_bytes(run.model, stack.ffn, sizes, shape.in_layer(stack.ffn))
            if platform == "gpu" and b == 2:  # cuDNN's attention is computed again
                named -= _attention_bytes(run.model, sizes, shape)
            saved += stack.num_layers * named
    if run.compute.remat == "minimal":
        saved += sum(_saved_adapter_bytes(w, sizes, shape) for w in stacked)
    for w in stacked if platform == "tpu" else ():
        # XLA:TPU casts these weights for all layers before the loop over layers, and pads those whose last dim fills no lanes.
        if w.kind == "linear" and not w.path.part and w.itemsize > b:
            saved += w.layers * w.elements(sizes) * b
        if _is_narrow(w):
            saved += _padded_bytes(w, sizes, platform)
    return saved


def _attention_bytes(model: config.Model, sizes: dict[str, int], shape: MicrobatchShape) -> int:
    """Return the bytes of the results of a layer's attention, and of its log-sum-exps in float32."""
    a = attention_sizes(model)
    return shape.tokens * (a.outputs * shape.itemsize + a.num_heads * 4) // sizes["tensor"]


def _saved_adapter_bytes(w: ShardedWeight, sizes: dict[str, int], shape: MicrobatchShape) -> int:
    """Return the bytes that remat `minimal` keeps for the adapter of a linear map with this B: its result, and that of A.

    Both are results of projections like the weight's own, of which the last one of a layer is not needed: the next layer's input is
    there. Experts add their adapters before the sum is named.
    """
    if w.path.leaf != "lora_b" or w.kind == "expert" or not w.path.in_layer:
        return 0
    rank = w.shape[0]
    # `tensor` splits the outputs of projections to heads, and nothing else of them.
    outputs = w.elements(sizes, ("data", "fsdp", "expert", "context")) // rank
    is_last = w.path.is_ffn and w.path.module.endswith("down_proj")
    return w.layers * shape.tokens * (rank if is_last else outputs + rank) * shape.itemsize


def _padded_bytes(w: ShardedWeight, sizes: dict[str, int], platform: Platform) -> int:
    """Return the bytes of a weight of all layers, or of its gradient, in the padded layout that kernels for TPUs use."""
    if platform == "tpu" and _is_narrow(w):
        return w.stored_bytes(sizes) * LANES // w.shape[-1]
    return w.stored_bytes(sizes)


def _is_narrow(w: ShardedWeight) -> bool:
    """Return whether kernels pad the weight's rank to whole lanes.

    This holds for the adapters of experts, since kernels read rows; XLA transposes other narrow weights instead.
    """
    return w.kind == "expert" and w.path.is_adapter and w.shape[-1] < LANES


def _named_activation_bytes(model: config.Model, ffn: config.Ffn, sizes: dict[str, int], shape: MicrobatchShape) -> int:
    """Return the bytes that remat `minimal` keeps per layer besides its input (`stack.SAVED`)."""
    m = shape.tokens
    b = shape.itemsize
    t = sizes["tensor"]
    D = model.model_dim
    a = attention_sizes(model)
    # Along `context` keys and values are computed again from the gathered latents.
    heads = a.queries if a.key_latent and sizes["context"] > 1 else a.projections_of_heads
    # Results of all projections, and attention.
    saved = m * (a.latents + heads // t + D) * b + _attention_bytes(model, sizes, shape)
    f = ffn.ffn_dim // t
    if not isinstance(ffn, config.MoeFfn):
        return saved + m * 2 * f * b
    # router logits in float32, and two numbers of 4 bytes for each chosen expert
    saved += m * ffn.num_experts * 4 + 2 * m * ffn.experts_per_token * 4
    if not shape.recomputes_experts:
        # gate, up and output of each row, and two numbers of 4 bytes
        saved += shape.rows * (2 * f + D) * b + 2 * shape.rows * 4
    return saved + m * 2 * f * ffn.num_shared_experts * b


def _layer_bytes(
    run: config.Run, ffn: config.Ffn, stacked: list[ShardedWeight], sizes: dict[str, int], shape: MicrobatchShape
) -> int:
    """Return the bytes that the backward pass of one period of layers of one stack needs at its peak on a TPU.

    Saved activations and gradients are not included.
    """
    model = run.model
    m = shape.tokens
    b = shape.itemsize
    t = sizes["tensor"]
    a = attention_sizes(model)
    projections = 0
    for w in stacked:
        if w.kind == "linear" and not w.path.is_ffn and not w.path.is_adapter:
            projections += w.elements(sizes, _GATHER_AXES) * b
    if isinstance(ffn, config.MoeFfn):
        parts = _experts_bytes(run, ffn, stacked, sizes, shape)
    else:
        parts = _dense_ffn_bytes(run, ffn, stacked, sizes, shape)
    # attention: its output, log-sum-exps in whole lanes of 128 numbers of 4 bytes, and q, k, v
    sequence = sizes["context"] if a.key_latent else 1  # of latents, each device expands those of the whole sequence
    heads = (a.outputs + a.queries + sequence * (a.keys + a.values)) // t
    attention = m * (heads * b + a.num_heads // t * 128 * 4) + 3 * m * model.model_dim * b
    # The product of gate and up involves six arrays in the backward pass (both, their product, and the gradient of each);
    # three of them reuse the space of the others, unless adapters need them again.
    has_adapters = any(w.path.is_adapter and w.path.is_ffn for w in stacked)
    num_products = 6 if has_adapters else 3
    # The factor 9 / 5 fits the buffer assignments that the module's docstring names.
    return parts.weights + num_products * parts.product + parts.inputs + projections * 9 // 5 + attention


_GATHER_AXES = ("fsdp", "expert")


class _FfnBytes(NamedTuple):
    """Bytes of a feed-forward layer on one device."""

    weights: int
    """Gathered weights, and what their use adds."""
    product: int
    """One array of hidden activations."""
    inputs: int
    """The rows that it is applied to, and their gradients."""


def _experts_bytes(
    run: config.Run, ffn: config.MoeFfn, stacked: list[ShardedWeight], sizes: dict[str, int], shape: MicrobatchShape
) -> _FfnBytes:
    b = shape.itemsize
    D = run.model.model_dim
    matrices = [w for w in stacked if w.kind == "expert" and not w.path.is_adapter and w.path.part != "scales"]
    gathered = 0
    for w in matrices:
        gathered += w.elements(sizes, ("fsdp",)) * numbers_per_element(w, run) * b
    weights = gathered
    if shape.recomputes_experts and any(w.trainable for w in matrices):  # their gradients are summed over chunks
        weights += gathered
    if is_nf4(run):  # dequantizes one matrix at a time: the halves of its blocks, one byte per number
        weights += gathered // 3 // b
    inputs = shape.rows * D * b * (3 if shape.recomputes_experts else 2)
    # The gathered tokens of all devices along `expert`.
    if shape.transport == "all_gather":
        inputs += sizes["expert"] * shape.tokens * D * b
    return _FfnBytes(weights, shape.rows * (ffn.ffn_dim // sizes["tensor"]) * b, inputs)


def _dense_ffn_bytes(
    run: config.Run, ffn: config.Ffn, stacked: list[ShardedWeight], sizes: dict[str, int], shape: MicrobatchShape
) -> _FfnBytes:
    b = shape.itemsize
    weights = 0
    for w in stacked:
        if w.kind == "linear" and w.path.is_ffn and not w.path.is_adapter and w.path.part != "scales":
            weights += w.elements(sizes, _GATHER_AXES) * numbers_per_element(w, run) * b
    product = shape.tokens * (ffn.ffn_dim // sizes["tensor"]) * b
    return _FfnBytes(weights, product, shape.tokens * run.model.model_dim * b)


def _loss_bytes(model: config.Model, layout: WeightLayout, sizes: dict[str, int], shape: MicrobatchShape) -> int:
    """Return the bytes of the head in compute dtype, its float32 gradient if trained, a chunk of logits, and the hidden states."""
    v = model.vocab_size // sizes["tensor"]
    D = model.model_dim
    tables = [w for w in layout.weights if w.kind == "table" and (w.path.is_head or model.tie_embeddings)]
    trained = any(w.trainable for w in tables)
    head = v * D * (shape.itemsize + (4 if trained else 0))
    return head + chunk_rows(shape.tokens, v) * v * 4 + 2 * shape.tokens * D * shape.itemsize


def _table_gradient_bytes(model: config.Model, layout: WeightLayout, sizes: dict[str, int], shape: MicrobatchShape) -> int:
    """Return the bytes of the gradients of embedding and head before they are scattered.

    XLA scatters the head's, in float32, only when the layers are done. The embedding's is then there three times in the compute
    dtype: as it is summed over tokens, in another layout, and being scattered. Only large vocabularies make this the peak: in
    Mistral Small 4 (131072 x 4096) and Large 3, which were compiled for v5p.
    """
    gathered = model.vocab_size // sizes["tensor"] * model.model_dim
    trained = [w for w in layout.weights if w.kind == "table" and w.trainable and not w.path.is_adapter]
    head = 4 if any(w.path.is_head or model.tie_embeddings for w in trained) else 0
    embedding = 3 * shape.itemsize if any(w.path.is_embedding for w in trained) else 0
    return gathered * (head + embedding)

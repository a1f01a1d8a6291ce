"""Bytes that a device receives from others in one step, collective by collective, modelled after the code of the model.

With g devices along an axis and an array of W bytes in total, a device receives (g - 1) / g * W in an all-gather (W is its
result), a reduce-scatter (W is its operand) or an all-to-all (W is its operand), and twice that in an all-reduce, which is a
reduce-scatter and an all-gather (Rabenseifner 2004, as in Megatron-LM's and DeepSpeed's accounts, arXiv:1910.02054
section 7).

A layer's weights are gathered in the forward pass and again in the backward pass, where one gather serves both the
recomputation and the gradients of the inputs; gradients are scattered once (arXiv:2304.11277, fully sharded data parallel).
All of this happens in every microbatch; along `data` gradients are summed once per step.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from moe_train import config
from moe_train.model.moe.transport.choose import choose_transport, exchange_sizes
from moe_train.model.moe.transport.transport import TransportName
from moe_train.plan.attention_sizes import attention_sizes
from moe_train.plan.weights import ShardedWeight, WeightLayout, axis_sizes

ITEMSIZE = {"float32": 4, "bfloat16": 2}
GRADIENT_SUM_AXES = ("fsdp", "expert", "context")
"""Axes that a gradient is summed over in each microbatch."""


class Flow(NamedTuple):
    """What one device receives in a step through collectives of one kind."""

    what: str
    """What is sent, in words."""
    kind: str
    """The collective, such as all-gather."""
    axis: str
    """The mesh axis, or several joined by `+`."""
    bytes: float
    overlaps: bool
    """Whether it could overlap with matrix products: true for weights and gradients, false for tokens, which products wait for.
    Whether it does is the compiler's choice (`roofline`)."""


class MicrobatchShape(NamedTuple):
    """The work of one microbatch on one device."""

    tokens: int
    itemsize: int
    """Bytes of an element of an activation."""
    transport: TransportName | None
    """None if the device holds all experts, or if the model has none."""
    rows: int
    """Rows that experts (or a dense feed-forward layer) are applied to at once."""
    recomputes_experts: bool = False
    """Whether the transport runs the experts again in the backward pass, regardless of `compute.remat`."""

    def in_layer(self, ffn: config.Ffn) -> MicrobatchShape:
        """Return the microbatch as a layer with this feed-forward part sees it.

        Dense layers of a sparse model process the device's own tokens.
        """
        if isinstance(ffn, config.MoeFfn):
            return self
        return self._replace(transport=None, rows=self.tokens)


def microbatch_shape(run: config.Run, platform: str | None = None) -> MicrobatchShape:
    """Return the work of one microbatch on one device of a resolved run whose mesh has no -1.

    Args:
        run: the resolved run.
        platform: the platform that transport `auto` is resolved for; None for that of this process.
    """
    model = run.model
    train = run.train
    sizes = axis_sizes(run.mesh)
    sequences = train.batch_size // train.microbatches // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    tokens = sequences * train.seq_len // sizes["context"]
    itemsize = ITEMSIZE[run.compute.dtype]
    if not isinstance(model.ffn, config.MoeFfn):
        return MicrobatchShape(tokens, itemsize, None, tokens)
    exchange = exchange_sizes(run, sizes)
    if exchange.devices == 1:
        return MicrobatchShape(tokens, itemsize, None, exchange.assignments)
    transport = choose_transport(run.compute.transport, exchange, platform)
    return MicrobatchShape(tokens, itemsize, transport.NAME, transport.rows_at_once(exchange), transport.RECOMPUTES_EXPERTS)


def flows(run: config.Run, layout: WeightLayout, platform: str | None = None) -> list[Flow]:
    """Model every collective of a step that moves more than a few numbers, largest first.

    Args:
        run: the resolved run.
        layout: its weights with their shardings.
        platform: the platform that the program is compiled for.
    """
    sizes = axis_sizes(run.mesh)
    shape = microbatch_shape(run)
    M = run.train.microbatches
    collectives: list[Flow] = []
    for w in layout.weights:
        collectives += _weight_flows(w, sizes, shape.itemsize, run.model.tie_embeddings)
    collectives += _token_flows(run, run.model, sizes, shape, platform)
    forward_passes = run.loss.needs_routing_pass(M) + config.extra_forward_passes(run.objective, run.lora is not None)
    if forward_passes:
        in_passes = [_in_forward_pass(flow) for flow in collectives]
        collectives += [flow._replace(bytes=forward_passes * flow.bytes) for flow in in_passes]
    collectives = [flow._replace(bytes=M * flow.bytes) for flow in collectives]
    trained = (w for w in layout.weights if w.trainable)
    # Accumulated gradients are all-reduced in the compute dtype (`StepDefinition.gradient_dtype`).
    gradients = sum(w.layers * w.elements(sizes) * min(w.itemsize, shape.itemsize) for w in trained)
    collectives.append(Flow("gradients", "all-reduce", "data", _received_bytes("all-reduce", sizes["data"], gradients), True))
    combined: dict[Flow, float] = {}
    for flow in collectives:
        without_bytes = flow._replace(bytes=0.0)
        combined[without_bytes] = combined.get(without_bytes, 0.0) + flow.bytes
    nonzero = [flow._replace(bytes=received) for flow, received in combined.items() if received]
    return sorted(nonzero, key=lambda flow: -flow.bytes)


def _in_forward_pass(flow: Flow) -> Flow:
    """Return what a forward pass alone moves of the same kind."""
    share = 0.0
    if flow.what == "tokens to experts":
        share = 2 / 5  # there and back, which the backward pass repeats for inputs and for gradients
    elif flow.what in ("activations", "queries"):
        share = 1 / 3
    elif flow.kind == "all-gather":  # of weights, keys and values: gathered again in the backward pass
        share = 1 / 2
    return flow._replace(bytes=share * flow.bytes)


def _received_bytes(kind: str, devices: int, size: float) -> float:
    """Return the bytes that a device receives in a collective on an array of `size` bytes in total."""
    passes = 2 if kind == "all-reduce" else 1
    return passes * (devices - 1) / devices * size


def _weight_flows(w: ShardedWeight, sizes: dict[str, int], itemsize: int, tied: bool) -> list[Flow]:
    """Return the gathers of a weight and the sums of its gradient, for all layers and one microbatch."""
    name = {"expert": "expert weights", "linear": "weights", "table": "embeddings", "small": "small weights"}[w.kind]
    # Quantized values and scales are sent as they are; other weights in the compute dtype.
    b = w.itemsize if w.path.part else min(w.itemsize, itemsize)
    # Along these axes no two devices have the same weight, so nothing is gathered.
    expert_axes = ("expert",) if w.kind == "expert" else ()
    spec_axes = set(itertools.chain.from_iterable(w.spec))
    split = (spec_axes & {"fsdp", "expert"}) - {*expert_axes}
    gather_order = ("fsdp", "expert") if w.kind == "table" else ("expert", "fsdp")
    order = [axis for axis in gather_order if axis in split]
    # A tied table is used as the embedding and as the head. Layers gather once more in the backward pass, tables do not.
    uses = 2 if tied and w.path.is_embedding and not w.path.is_adapter else 1
    gathers = uses if w.kind == "table" else 2

    def transfer(kind: str, axis: str, devices: int, size: float, times: int) -> Flow:
        """Return the transfer of a weight of all layers, which overlaps with products."""
        return Flow(name, kind, axis, times * w.layers * _received_bytes(kind, devices, size), True)

    transfers = []
    gathered = w.elements(sizes)
    for axis in order:
        gathered *= sizes[axis]
        transfers.append(transfer("all-gather", axis, sizes[axis], gathered * b, gathers))
    if not w.trainable:
        return transfers
    # In the reverse order of the gathers, so that the operand of each scatter is as large as the result of its gather.
    for axis in order[::-1]:
        transfers.append(transfer("reduce-scatter", axis, sizes[axis], gathered * b, uses))
        gathered //= sizes[axis]
    # Gradients of weights not split along these axes are all-reduced: those of small weights in their stored dtype.
    b = w.itemsize if w.kind == "small" else b
    summed = [axis for axis in GRADIENT_SUM_AXES if sizes[axis] > 1 and axis not in (*split, *expert_axes)]
    transfers.append(transfer("all-reduce", "+".join(summed), math.prod(sizes[axis] for axis in summed), gathered * b, 1))
    return transfers


def _token_flows(
    run: config.Run, model: config.Model, sizes: dict[str, int], shape: MicrobatchShape, platform: str | None
) -> list[Flow]:
    """Return the transfers of activations, for all layers and one microbatch."""
    m = shape.tokens
    b = shape.itemsize
    D = model.model_dim
    L = model.num_layers
    a = attention_sizes(model)
    tensor = sizes["tensor"]
    context = sizes["context"]
    transfers = []

    def add(purpose: str, kind: str, axis: str, size: float, times: int = 1) -> None:
        """Add a transfer that products wait for."""
        transfers.append(Flow(purpose, kind, axis, times * _received_bytes(kind, sizes[axis], size), False))

    num_sparse = len(config.sparse_layers(model))
    if shape.transport is not None and isinstance(model.ffn, config.MoeFfn):
        exchange = exchange_sizes(run, sizes)
        for kind, received in choose_transport(shape.transport, exchange).received(exchange).items():
            exchanged: float = num_sparse * received
            if kind == "ragged-all-to-all":  # a row's routing weight fills 128 lanes: sent twice, and its gradient in float32
                exchanged += exchanged / (5 * D * b) * 128 * (2 * b + 4)
            transfers.append(Flow("tokens to experts", kind, "expert", exchanged, False))
    # Along `tensor` (Megatron-LM, arXiv:1909.08053, section 3) the outputs of attention (again if recomputed) and of the
    # feed-forward layer are summed, and so are the gradients of the inputs of both. With all_gather these outputs are for
    # the tokens of all devices of `expert`; XLA:TPU scatters them before summing, so that only a device's own are left.
    x = m * D * b
    num_outputs = 2 if run.compute.remat == "full" else 1
    # Copies of the latents on all devices of `context` have gradients of their own, which are summed over `tensor` too.
    attention = x * num_outputs + m * (a.input_gradients + (context - 1) * a.key_latent) * b
    dense = x * (1 + 2)
    y = x if shape.transport in (None, "all_gather") else m * D * 4  # other transports combine rows in float32
    num_shares = sizes["expert"] if shape.transport == "all_gather" and platform != "tpu" else 1
    sparse = y * num_shares + x
    layers = L * attention + num_sparse * sparse + (L - num_sparse) * dense
    add("activations", "all-reduce", "tensor", layers + 2 * x)  # plus the embedding and the head
    # Along `context` each device gathers all keys and values, or the latents that they are computed from (which `tensor` does
    # not split), again in the backward pass, and scatters their gradients.
    # Queries and the outputs of attention are exchanged in zig-zag order (`context_parallel`) and back: in the forward pass,
    # in its recomputation, and for their gradients. With two devices, one half of each stays where it is.
    keys = m * context * (a.key_latent or (a.keys + a.values) // tensor) * b
    queries = m * (a.queries + a.outputs) // tensor * b
    add("keys and values", "all-gather", "context", keys, 2 * L)
    add("keys and values", "reduce-scatter", "context", keys, L)
    sent_queries = {1: 0.0, 2: queries / 2}.get(context, queries)
    transfers.append(Flow("queries", "collective-permute", "context", 3 * L * sent_queries, False))
    return transfers

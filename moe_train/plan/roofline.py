"""A lower bound on the time of a step and what limits it: FLOPs, HBM bytes and received bytes over the device's peak rates.

The roofline is that of Williams et al. (doi:10.1145/1498765.1498785). Matrix products, HBM traffic and those collectives that
the compiler starts early overlap, so the slowest of them counts. Products wait for tokens sent to experts, for activations
summed over `tensor`, for keys and values, and, as XLA:TPU compiles our programs for all chips but v5p, for gathered weights
(`_hidden_share`), so these add up:

    step = max(FLOPs / peak, HBM bytes / bandwidth, overlapping bytes / network) + waited-for bytes / network

Real steps are longer: MaxText reports 53% of the peak FLOP/s for Mixtral 8x7B on 256 v5p chips (its README). The share of
the peak at this bound is printed with each choice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe_train import config
from moe_train.machine.devices import Device
from moe_train.machine.mesh import AXES
from moe_train.model.flops import flops_per_token
from moe_train.model.tower_flops import flops_of_run
from moe_train.plan.attention_sizes import attention_sizes
from moe_train.plan.topology import Topology
from moe_train.plan.traffic import Flow, MicrobatchShape, microbatch_shape
from moe_train.plan.weights import WeightLayout, axis_sizes


class Time(NamedTuple):
    """Seconds of a step on one device, with each resource at its peak rate."""

    compute: float
    hbm: float
    network: float
    """Inside a slice or host, overlapping with products."""
    waited: float
    """Inside a slice or host, while nothing else runs."""
    dcn: float
    """Between slices or hosts, overlapping with products."""
    dcn_waited: float
    """Between slices or hosts, while nothing else runs."""

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return max(self.compute, self.hbm, self.network, self.dcn) + self.waited + self.dcn_waited

    @property
    def binds(self) -> str:
        """The resource that takes the largest part of the step: compute, HBM, network (inside a slice) or DCN."""
        parts = {
            "compute": self.compute,
            "HBM": self.hbm,
            "network": self.network + self.waited,
            "DCN": self.dcn + self.dcn_waited,
        }
        return max(parts, key=lambda name: parts[name])


class Work(NamedTuple):
    """What one device does in one step."""

    model_flops: float
    """FLOPs that the model needs, without recomputation."""
    flops: float
    """FLOPs including what is recomputed in the backward pass."""
    hbm_bytes: float
    network_bytes: float
    """Bytes received inside the slice or host."""
    dcn_bytes: float
    """Bytes received from other slices or hosts."""


def step_work(run: config.Run, layout: WeightLayout, flows: list[Flow], topology: Topology) -> Work:
    """Count what one device does in one step of a resolved run.

    Args:
        run: the resolved run, whose mesh has no -1.
        layout: the weights of the run with their shardings.
        flows: the collectives of a step, as modelled by `traffic.flows`.
        topology: decides which bytes cross slices.
    """
    train = run.train
    model = run.model
    shape = microbatch_shape(run)
    tokens = train.batch_size * train.seq_len / topology.num_devices
    trained = layout.trainable if run.lora is not None else None
    model_flops = tokens * flops_of_run(run, trained)
    recomputed_flops = tokens * (_recomputed_flops(run, model, shape) + _copied_flops(run))
    if run.loss.needs_routing_pass(train.microbatches):
        recomputed_flops += tokens * _forward_flops(run)
    # A third of full training is a forward pass, head included.
    extra_passes = config.extra_forward_passes(run.objective, run.lora is not None)
    recomputed_flops += tokens * extra_passes * flops_per_token(model, train.seq_len) / 3
    sizes = axis_sizes(run.mesh)
    dcn_bytes = sum(_bytes_between_slices(flow, sizes, topology.devices_per_slice) for flow in flows)
    return Work(
        model_flops=model_flops,
        flops=model_flops + recomputed_flops,
        hbm_bytes=_hbm_bytes(run, model, layout, shape),
        network_bytes=sum(flow.bytes for flow in flows) - dcn_bytes,
        dcn_bytes=dcn_bytes,
    )


def _recomputed_flops(run: config.Run, model: config.Model, shape: MicrobatchShape) -> float:
    """Return the FLOPs per token that are computed again in the backward pass.

    With remat `full` it is the layers' whole forward pass, otherwise that of experts whose transport recomputes them.
    """
    D = model.model_dim
    if run.compute.remat == "full":
        return _forward_flops(run)
    if isinstance(model.ffn, config.MoeFfn) and shape.recomputes_experts:
        return len(config.sparse_layers(model)) * 2 * 3 * D * model.ffn.ffn_dim * model.ffn.experts_per_token
    return 0.0


def _copied_flops(run: config.Run) -> float:
    """Return the FLOPs per token of keys and values that a device of `context` computes for the tokens of the others.

    Under `context` latents are gathered, and each device expands those of the whole sequence: in the forward pass, again in the
    backward pass, and with two products for the gradients. This is for its own tokens what `model_flops` and remat `full` count.
    """
    a = run.model.attention
    if run.mesh.context == 1 or not isinstance(a, config.MultiHeadLatentAttention):
        return 0.0
    product = 2 * a.kv_lora_rank * attention_sizes(run.model).expanded
    counted = 4 if run.compute.remat == "full" else 3
    return run.model.num_layers * product * (4 * run.mesh.context - counted)


def _forward_flops(run: config.Run) -> float:
    """Return the FLOPs per token of the layers' forward pass, without the head."""
    # A third of full training is its forward pass.
    return flops_per_token(run.model, run.train.seq_len) / 3 - 2 * run.model.vocab_size * run.model.model_dim


def _hbm_bytes(run: config.Run, model: config.Model, layout: WeightLayout, shape: MicrobatchShape) -> float:
    """Return the HBM bytes of a step on one device.

    Weights are written once where they are gathered and read by each product, in each microbatch; gradients are written and
    read. Activations are the operands and results of a layer's products, counted three times (forward and both gradients), and
    once more if recomputed. The update reads gradients, and reads and writes weights and moments.
    """
    sizes = axis_sizes(run.mesh)
    M = run.train.microbatches
    b = shape.itemsize
    recomputations = (run.compute.remat == "full") + run.loss.needs_routing_pass(M)
    recomputations += config.extra_forward_passes(run.objective, run.lora is not None)
    total = 0.0
    for w in layout.weights:
        gather_axes = ("fsdp",) if w.kind == "expert" else ("fsdp", "expert")
        weight_bytes = w.layers * w.elements(sizes, gather_axes) * min(b, w.itemsize)
        # Written by the gathers of forward and backward pass, and read by the products of the forward pass and of input gradients.
        total += M * weight_bytes * (2 + 2 + recomputations)
        if w.trainable:
            # The update (the last three) reads the gradient, and reads and writes the weight.
            total += M * weight_bytes * 3 + 3 * w.stored_bytes(sizes)
    total += 2 * layout.optimizer_bytes
    a = attention_sizes(model)
    t = sizes["tensor"]
    D = model.model_dim
    m = shape.tokens
    heads = (a.projections_of_heads + a.outputs) // t + a.latents
    layers = 0
    for stack in config.stacks(model):
        ffn = stack.ffn
        rows = m
        if isinstance(ffn, config.MoeFfn):  # routing is assumed to be balanced
            rows = m * (ffn.experts_per_token + ffn.num_shared_experts)
        layers += stack.num_layers * (m * (2 * heads + 6 * D) * b + rows * (4 * ffn.ffn_dim // t + 4 * D) * b)
    # The last summand is the float32 logits, three times like other activations.
    return total + M * layers * (3 + recomputations) + M * 3 * m * (model.vocab_size // t) * 4


def step_time(work: Work, flows: list[Flow], run: config.Run, topology: Topology, device: Device) -> Time:
    """Return the roofline of a step.

    Args:
        work: what one device does in the step.
        flows: the collectives of the step.
        run: the resolved run.
        topology: decides which bytes cross slices.
        device: a chip. If JAX sees a chip as two devices, each has half of its rates.
    """
    # Rates in the table are those of a chip, which several devices may share.
    share = topology.devices_per_chip
    sizes = axis_sizes(run.mesh)
    inside_seconds = {True: 0.0, False: 0.0}
    outside_seconds = {True: 0.0, False: 0.0}
    for flow in flows:
        outside_bytes = _bytes_between_slices(flow, sizes, topology.devices_per_slice)
        hidden_share = _hidden_share(flow, sizes, device, run.train.microbatches, outside_bytes > 0)
        inside = (flow.bytes - outside_bytes) / (_bandwidth(flow, sizes, topology, device) / share)
        outside = outside_bytes / (device.dcn_bandwidth / share)
        for hidden, part in ((True, hidden_share), (False, 1 - hidden_share)):
            inside_seconds[hidden] += part * inside
            outside_seconds[hidden] += part * outside
    return Time(
        compute=work.flops / (device.flops[run.compute.dtype] / share),
        hbm=work.hbm_bytes / (device.hbm_bandwidth / share),
        network=inside_seconds[True],
        waited=inside_seconds[False],
        dcn=outside_seconds[True],
        dcn_waited=outside_seconds[False],
    )


HIDDEN_IN_STAGES = 0.6
"""Share of the weights gathered over all chips of a v5p slice that arrives beside products: Mixtral 8x7B, fsdp 64, compiled.

Such a gather has two stages (`collectives`), of which the first, and the second of one expert matrix of three, are waited for.
"""


def _hidden_share(flow: Flow, sizes: dict[str, int], device: Device, microbatches: int, leaves_slice: bool) -> float:
    """Return the share of a collective's bytes that is received beside matrix products.

    On TPUs only what compiled programs show counts: XLA:TPU fuses an asynchronous collective with a product of its own, while
    ours are in Pallas kernels, so collectives are synchronous, and so is the sum of gradients after the last product. SparseCores
    of a v5p gather weights and scatter gradients along fsdp meanwhile (98% and 99% of their bytes, `compiler_options`), and sum
    gradients over the replicas of a slice (99%). Sums of several microbatches, which come after the last product, and those
    between slices were not compiled, and count as waited for. On GPUs whatever can overlap is counted: 83% to 99% of gathered
    bytes do in programs that take less than 80% of the memory (docs/measurements.md), and almost none in others.
    """
    if not flow.overlaps:
        return 0.0
    if device.torus_dims == 0:
        return 1.0
    if "v5p" not in device.kinds:
        return 0.0
    if (flow.axis, flow.kind) == ("data", "all-reduce"):
        return 1.0 if microbatches == 1 and not leaves_slice else 0.0
    if flow.axis != "fsdp" or flow.kind not in ("all-gather", "reduce-scatter"):
        return 0.0
    is_only_axis = all(size == 1 for axis, size in sizes.items() if axis not in ("data", "fsdp"))
    return HIDDEN_IN_STAGES if is_only_axis and flow.kind == "all-gather" else 1.0


def _bandwidth(flow: Flow, sizes: dict[str, int], topology: Topology, device: Device) -> float:
    """Return the bytes/s that a chip receives along the axes of `flow`.

    A switch gives each chip all of its links. On a torus of n dims, an axis of g of N devices is assumed to span
    n * log g / log N of the dims, each with two links, of which one is lost where the torus does not close (v5e and v6e slices
    with a side below 16). An all-to-all travels s / 4 hops along each of its d dims of side s, and every hop occupies a link
    (https://jax-ml.github.io/scaling-book/sharding, "Our final communication primitive").
    """
    if device.torus_dims == 0 or topology.devices_per_slice == 1:
        return device.link_bandwidth
    g = min(math.prod(sizes[axis] for axis in flow.axis.split("+")), topology.devices_per_slice)
    dims = device.torus_dims * math.log(max(g, 2)) / math.log(max(topology.devices_per_slice, 2))
    bandwidth = device.link_bandwidth * dims / device.torus_dims
    if device.torus_dims == 2 and max(topology.shape) < 16:  # the torus does not close
        bandwidth /= 2
    if flow.kind.endswith("all-to-all"):
        side = g ** (1 / dims)
        bandwidth *= min(1.0, 4 / (dims * side))
    return bandwidth


def _bytes_between_slices(flow: Flow, sizes: dict[str, int], devices_per_slice: int) -> float:
    """Return the part of a flow's bytes that comes from other slices.

    Devices are laid out with `data` outermost and `tensor` innermost. A gather or sum over g devices in o slices works inside
    each slice first, so (o - 1) / o of the whole array, shared by the devices of a slice, comes from outside. For an all-to-all
    it is the share of the devices that are outside.
    """
    last = flow.axis.split("+")[-1]
    inner = math.prod(sizes[axis] for axis in AXES[AXES.index(last) + 1 :])
    g = math.prod(sizes[axis] for axis in flow.axis.split("+"))
    group_in_slice = max(1, min(g, devices_per_slice // inner))
    if group_in_slice == g:
        return 0.0
    if flow.kind.endswith("all-to-all"):
        return flow.bytes * (g - group_in_slice) / (g - 1)
    slices = g // group_in_slice
    return flow.bytes * ((slices - 1) / slices / group_in_slice) / ((g - 1) / g)

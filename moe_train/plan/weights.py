"""The weights of a run with their shardings, from shapes alone: the basis of the memory and traffic models."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.machine.mesh import AXES, abstract_mesh
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.train.optimizer import make_optimizer_of_any_length
from moe_train.train.state import partition, state_of_learned

WeightKind = Literal["expert", "linear", "table", "small"]
"""Kinds of weights by how they are sharded and gathered; see `ShardedWeight.kind`."""


class ShardedWeight(NamedTuple):
    """One array of the model."""

    path: ParameterPath
    kind: WeightKind
    """How the weight is used.

    - expert: weights of routed experts, gathered over `fsdp` inside `run_experts`.
    - linear: used by `fsdp.project`.
    - table: embedding or head, with rows split over V.
    - small: norms, routers and biases, replicated.
    """
    layers: int
    """Size of the leading dim of layers; 1 for weights outside the stacks."""
    shape: tuple[int, ...]
    """The global shape of one layer's weight."""
    spec: tuple[tuple[str, ...], ...]
    """The mesh axes of each dim of that shape."""
    itemsize: int
    """Bytes of an element as stored."""
    trainable: bool

    def elements(self, sizes: dict[str, int], gathered_over: tuple[str, ...] = ()) -> int:
        """Return the elements of one layer on a device.

        Args:
            sizes: devices of each mesh axis.
            gathered_over: axes that the weight is gathered over.
        """
        split_axes = set(itertools.chain.from_iterable(self.spec)) - set(gathered_over)
        return math.prod(self.shape) // math.prod(sizes[axis] for axis in split_axes)

    def stored_bytes(self, sizes: dict[str, int]) -> int:
        """Return the bytes of all layers on a device."""
        return self.layers * self.elements(sizes) * self.itemsize


class WeightLayout(NamedTuple):
    """Everything that a run keeps on a device between steps."""

    weights: tuple[ShardedWeight, ...]
    optimizer_bytes: int
    """Bytes of moments and counters on one device."""
    trainable: dict[str, jax.ShapeDtypeStruct]
    """{path: shape} of the trained parameters."""


def axis_sizes(mesh: config.Mesh) -> dict[str, int]:
    """Return the devices of each mesh axis."""
    return {axis: getattr(mesh, axis) for axis in AXES}


def layout(run: config.Run) -> WeightLayout:
    """Return the layout of a run whose model is stated and whose mesh has no -1.

    Raises:
        ValueError: mesh and model do not fit together.
    """
    # Settings that change no weight keep their defaults, so that more searches hit the cache.
    compute = config.Compute(dtype=run.compute.dtype, param_dtype=run.compute.param_dtype)
    return _layout(_Inputs(run.model, run.lora, run.optimizer, compute, run.mesh, run.model_encoder, run.trained_tower))


class _Inputs(NamedTuple):
    """All that a layout depends on. This is the cache key, since a search asks for each mesh many times."""

    model: config.Model
    lora: config.Lora | None
    optimizer: config.Optimizer
    compute: config.Compute
    """Only dtypes are stated, since kernels and transports change no weight."""
    mesh: config.Mesh
    encoder: config.Encoder | None
    trained_tower: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _layout(inputs: _Inputs) -> WeightLayout:
    sizes = axis_sizes(inputs.mesh)
    optimizer = make_optimizer_of_any_length(inputs.optimizer)
    with jax.sharding.use_abstract_mesh(abstract_mesh(sizes)):
        model = abstract_model(inputs.model, inputs.compute, inputs.lora, inputs.encoder)
        _, shapes = parameters(model)
        trained, _ = partition(shapes, inputs.lora, inputs.trained_tower)
        # Only shapes are computed: a model of any size takes milliseconds and no memory.
        state = jax.eval_shape(lambda trained: state_of_learned(trained, optimizer), trained)
    weights = tuple(_weight(ParameterPath.parse(path), x, path in state.trainable) for path, x in shapes.items())
    moments = sum(_local_bytes(x) for x in jax.tree.leaves(state.opt_state))
    return WeightLayout(weights, moments, state.trainable)


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Return the bytes of an array on one device; counters of the optimizer have no sharding."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def _weight(path: ParameterPath, x: jax.ShapeDtypeStruct, trainable: bool) -> ShardedWeight:
    assert isinstance(x.sharding, NamedSharding)
    axes = [_axes_of_dim(entry) for entry in x.sharding.spec]
    # A PartitionSpec may leave out trailing dims that are not split.
    axes += [()] * (x.ndim - len(axes))
    layers = 1
    shape = x.shape
    spec = axes
    if path.in_layer:
        layers = x.shape[0]
        shape = x.shape[1:]
        spec = axes[1:]
    # How a weight is sharded decides how it is gathered, whatever the module is called.
    kind: WeightKind = "small"
    if path.is_embedding or path.is_head:
        kind = "table"
    elif ("expert",) in spec:
        kind = "expert"
    elif any(spec) and len(shape) > 1:
        kind = "linear"
    return ShardedWeight(path, kind, layers, tuple(shape), tuple(spec), x.dtype.itemsize, trainable)


def _axes_of_dim(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a `PartitionSpec` names."""
    if isinstance(entry, tuple):
        return entry
    return (entry,) if entry else ()


def divisions(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `number` as an ordered product of `parts` factors."""
    if parts == 1:
        yield (number,)
        return
    for first in _divisors(number):
        yield from ((first, *rest) for rest in divisions(number // first, parts - 1))


@functools.lru_cache(maxsize=4096)
def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def numbers_per_element(w: ShardedWeight, run: config.Run) -> int:
    """Return how many numbers a stored element holds: NF4 packs two quantized values in a byte."""
    return 2 if w.path.part == "codes" and is_nf4(run) else 1


def is_nf4(run: config.Run) -> bool:
    """Return whether the frozen weights of a run are quantized to NF4."""
    return run.lora is not None and isinstance(run.lora.quantize, config.Nf4)

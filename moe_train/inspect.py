"""What a config would build: every parameter with its shape, dtype and sharding, from shapes alone.

Nothing is allocated, and the devices of the mesh need not be here.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from moe_train import config
from moe_train.mesh import AXES, make_mesh
from moe_train.model.transformer import init_model, parameters
from moe_train.train.state import partition


def inspect(run: config.Config) -> dict[str, Any]:
    """Rows (path, shape, dtype, spec, bytes_per_device, trainable) under `parameters`, then the totals.

    Raises ValueError where the mesh leaves an axis open (-1) that the devices here do not fill.
    """
    assert run.model is not None
    shapes = abstract_parameters(run, run.model)
    trainable, _ = partition(shapes)
    rows = [
        {
            "path": path,
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "spec": _shown(x.sharding.spec, x.ndim),
            "bytes_per_device": math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize,
            "trainable": path in trainable,
        }
        for path, x in shapes.items()
    ]
    return {
        "parameters": rows,
        "total_parameters": sum(x.size for x in shapes.values()),
        "active_parameters": active_parameters(shapes, run.model),
        "trainable_parameters": sum(x.size for x in trainable.values()),
        "bytes_per_device": sum(row["bytes_per_device"] for row in rows),
    }


def abstract_parameters(run: config.Config, model: config.Model) -> dict[str, Any]:
    """{path: ShapeDtypeStruct with its sharding} of a model, adapters included, on the mesh of `run`."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(run.mesh)):
        return parameters(jax.eval_shape(lambda: init_model(run.seed, model, run.compute, run.lora)))[1]


def abstract_mesh(sizes: config.Mesh) -> AbstractMesh:
    """The mesh without devices; an axis of -1 takes the devices that are here."""
    shape = tuple(getattr(sizes, axis) for axis in AXES)
    if -1 in shape:
        return make_mesh(sizes).abstract_mesh
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def active_parameters(shapes: dict[str, Any], model: config.Model) -> int:
    """Parameters that one token passes through: of the experts, the chosen ones."""
    if not isinstance(model.ffn, config.MoeFfn):
        return sum(x.size for x in shapes.values())
    share = model.ffn.experts_per_token / model.ffn.num_experts
    of_experts = {path for path in shapes if ".ffn." in path and ".router." not in path}
    return round(sum(x.size * (share if path in of_experts else 1) for path, x in shapes.items()))


def _shown(spec: Any, ndim: int) -> str:
    """`- fsdp tensor -`: the mesh axis of each dim, `-` where it is whole."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    return " ".join("-" if e is None else "+".join(e) if isinstance(e, tuple) else str(e) for e in entries)

"""Show what a config would build: every parameter with its shape, dtype and sharding, from shapes alone.

Nothing is allocated, and the devices of the mesh need not be present.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from moe_train import config
from moe_train.checkpoint.initial_files import describe_initial_files
from moe_train.machine.files import JsonObject
from moe_train.machine.mesh import abstract_mesh
from moe_train.model.moe.transport.choose import describe_transport
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import unquantized_shapes
from moe_train.model.transformer import abstract_model
from moe_train.run.resolve import resolve
from moe_train.train.state import partition


class Report(NamedTuple):
    """The parameters of a run and their totals."""

    config: config.Config
    """The resolved config: every default stated, with the architecture and tokenizer of `init_from`."""
    parameters: list[JsonObject]
    """Rows with path, shape, dtype, spec (the mesh axis of each dim), bytes_per_device and trainable."""
    totals: dict[str, int | str]
    """Counts and bytes; `transport` describes what crosses the mesh axis `expert` if it has more than one device, and
    `init_from` what of the initial files is not trained."""


def inspect(written: config.Config) -> Report:
    """List every parameter of a run from shapes alone; a mesh axis of -1 takes the devices that are present.

    Raises:
        ValueError: config, mesh and checkpoint do not fit together.
        FileNotFoundError: a checkpoint that the config names does not exist.
    """
    run = resolve(written, jax.device_count())
    shapes = abstract_parameters(run)
    trainable, _ = partition(shapes, run.lora, run.trained_tower)
    rows = [
        {
            "path": path,
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "spec": _spec_text(x.sharding.spec, x.ndim),
            "bytes_per_device": math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize,
            "trainable": path in trainable,
        }
        for path, x in shapes.items()
    ]
    totals: dict[str, int | str] = {
        # A quantized array has other dims than the weight that it stands for.
        "total_parameters": sum(x.size for x in unquantized_shapes(shapes).values()),
        "active_parameters": active_parameters(unquantized_shapes(shapes), run.model),
        "trainable_parameters": sum(x.size for x in trainable.values()),
        "bytes_per_device": sum(row["bytes_per_device"] for row in rows),
    }
    transport = describe_transport(run, run.mesh.model_dump())
    if transport:
        totals["transport"] = transport
    if run.init_from and (lines := describe_initial_files(run.init_from, run.trains_tower)):
        totals["init_from"] = "; ".join(lines)
    return Report(run.to_config(), rows, totals)


def abstract_parameters(run: config.Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {path: ShapeDtypeStruct with its sharding} of a model, adapters included, on the mesh of `run`."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(run.mesh.model_dump())):
        return parameters(abstract_model(run.model, run.compute, run.lora, run.model_encoder))[1]


def active_parameters(shapes: dict[str, jax.ShapeDtypeStruct], model: config.Model) -> int:
    """Count the parameters that one token passes through; of the experts, only the chosen ones count."""
    if not isinstance(model.ffn, config.MoeFfn):
        return sum(x.size for x in shapes.values())
    in_experts = sum(x.size for path, x in shapes.items() if ParameterPath.parse(path).is_expert(model))
    # Experts of a layer are equal in size, so the division below is exact.
    idle_experts = model.ffn.num_experts - model.ffn.experts_per_token
    return sum(x.size for x in shapes.values()) - in_experts * idle_experts // model.ffn.num_experts


def _spec_text(spec: jax.sharding.PartitionSpec, ndim: int) -> str:
    """Format a spec as `- fsdp tensor -`: the mesh axis of each dim, `-` for a dim that is not split."""
    # A spec may be shorter than the array; the dims that it leaves out are not split.
    entries = [*spec, *[None] * (ndim - len(spec))]
    return " ".join(_spec_entry_text(entry) for entry in entries)


def _spec_entry_text(entry: str | tuple[str, ...] | None) -> str:
    """Format the entry of one dim: its axes joined by `+`, or `-`."""
    if entry is None:
        return "-"
    return "+".join(entry) if isinstance(entry, tuple) else str(entry)

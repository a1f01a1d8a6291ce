"""The floating-point operations of a run, and the number of its parameters."""

from __future__ import annotations

import contextlib
import math

import jax

from moe_train import config
from moe_train.governance.lineage import Training
from moe_train.machine.mesh import AXES, abstract_mesh
from moe_train.model.flops import flops_per_token
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import unquantized_shapes
from moe_train.model.tower_flops import flops_of_run
from moe_train.model.transformer import abstract_model


def training_flops(training: Training) -> float:
    """Return the model FLOPs of a run up to a checkpoint: every position of every batch counts, padding included.

    Forward passes that the objective takes besides the one that is differentiated count, such as that of a reference model.
    """
    run = training.run
    trained: dict[str, jax.ShapeDtypeStruct] | None = None
    if run.lora is not None:
        shapes = _shapes(run)
        trained = {path: x for path, x in shapes.items() if ParameterPath.parse(path).is_trained(run.lora)}
    per_token = flops_of_run(run, trained)
    # A third of full training is a forward pass, head included.
    extra_passes = config.extra_forward_passes(run.objective, run.lora is not None)
    per_token += extra_passes * flops_per_token(run.model, run.train.seq_len) / 3
    return per_token * run.train.batch_size * run.train.seq_len * training.step


def num_parameters(run: config.Run) -> int:
    """Return the number of parameters of a run's model, its adapters included."""
    return sum(math.prod(shape.shape) for shape in _shapes(run).values())


def _shapes(run: config.Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of all parameters by path."""
    mesh: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if jax.sharding.get_abstract_mesh().empty:
        # For the shapes alone: without any, `abstract_model` would put one in force for the rest of the process.
        mesh = jax.sharding.use_abstract_mesh(abstract_mesh(dict.fromkeys(AXES, 1)))
    with mesh:
        _, shapes = parameters(abstract_model(run.model, run.compute, run.lora, run.model_encoder))
    return unquantized_shapes(shapes)

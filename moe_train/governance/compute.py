"""The floating-point operations of a run."""

from __future__ import annotations

import jax

from moe_train.governance.lineage import Training
from moe_train.model.flops import flops_per_token
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import unquantized_shapes
from moe_train.model.transformer import abstract_model


def training_flops(training: Training) -> float:
    """Return the model FLOPs of a run up to a checkpoint: every position of every batch counts, padding included."""
    run = training.run
    trained: dict[str, jax.ShapeDtypeStruct] | None = None
    if run.lora is not None:
        _, shapes = parameters(abstract_model(run.model, run.compute, run.lora))
        shapes = unquantized_shapes(shapes)
        trained = {path: x for path, x in shapes.items() if ParameterPath.parse(path).is_trained(run.lora)}
    per_token = flops_per_token(run.model, run.train.seq_len, trained)
    return per_token * run.train.batch_size * run.train.seq_len * training.step

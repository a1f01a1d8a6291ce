"""The configuration of a run as the user writes it: one YAML file is one `Config`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.adapters import Lora
from moe_train.config.architecture import Model
from moe_train.config.checks import check_batch, check_model, check_rounding
from moe_train.config.compute import Compute, Mesh
from moe_train.config.data import Data
from moe_train.config.objective import NextToken, Objective, check_records
from moe_train.config.optimization import Loss, Optimizer
from moe_train.config.section import LocalPath, Section, Seed
from moe_train.config.training import Checkpoint, Evaluation, Metrics, Train

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Name of a run: it starts with a letter or digit; then letters, digits, `.`, `_` and `-` are allowed."""


class Config(Section):
    """The complete configuration of one run.

    Set `model` to train an architecture from random weights, or `init_from` to start from a checkpoint. Set `export: none` to
    train an architecture that no file format can express.
    """

    name: RunName
    run_dir: LocalPath
    seed: Seed = 0
    init_from: LocalPath | None = None
    model: Model | None = None
    lora: Lora | None = None
    data: Data | None = None
    objective: Objective = NextToken(name="next_token")
    train: Train
    optimizer: Optimizer
    loss: Loss = Loss()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    export: Literal["all", "none"] = "all"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model is None and self.init_from is None:
            raise ValueError("state model (an architecture to train from random weights) or init_from (a checkpoint to start from)")
        # Otherwise `resolve` checks it, once it has read the architecture of `init_from`.
        if self.model is not None:
            check_model(self, self.model)
        if self.data is not None:
            check_records(self.objective, self.data)
        check_batch(self)
        check_rounding(self)
        if self.compute.attention == "cudnn" and self.compute.dtype == "float32":
            raise ValueError(
                "compute.attention cudnn does not support float32; set compute.dtype to bfloat16, or attention to auto"
            )
        return self

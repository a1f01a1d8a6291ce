"""Every section of a run's configuration, and every check that needs no hardware.

One YAML file holds one complete run. A choice between kinds is a tagged union (`optimizer: {name: adamw, …}`);
a default is written once, here. Nothing in this file imports jax, so that `--help` and editors are quick.
`config_file` turns YAML and `key.path=value` overrides into a `Config`, and its errors into one line each.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.adapters import Lora
from moe_train.config.architecture import Model, MoeFfn, without_format
from moe_train.config.compute import Compute, Mesh
from moe_train.config.data import Data
from moe_train.config.objective import NextToken, Objective, check_records
from moe_train.config.optimization import Loss, Optimizer
from moe_train.config.section import (
    Fraction,
    LocalPath,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
)

# --- model -----------------------------------------------------------------------------------------------------


# --- adapters --------------------------------------------------------------------------------------------------


# --- data ------------------------------------------------------------------------------------------------------


# --- optimisation ----------------------------------------------------------------------------------------------


class Train(Section):
    """Length and shape of the optimisation. Exactly one of `steps`, `epochs`, `tokens` sets the length.

    batch_size is the number of sequences in an optimizer step over all devices; microbatches splits it.
    capacity_factor limits an expert to capacity_factor * T * A / E assignments of a sequence of T tokens, in training
    alone; what is beyond is dropped, earlier tokens first served (null: nothing is dropped). The run stops where a layer
    drops more than max_drop_rate of its assignments in a step.
    """

    steps: Annotated[Positive, Field(le=100_000_000)] | None = None
    epochs: Positive | None = None
    tokens: Positive | None = None
    batch_size: Positive
    seq_len: Positive
    microbatches: Positive = 1
    max_skipped_steps: NonNegative = 3
    capacity_factor: PositiveFloat | None = None
    max_drop_rate: Fraction | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [k for k in ("steps", "epochs", "tokens") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"the length of a run is exactly one of steps, epochs, tokens; here: {', '.join(given) or 'none'}")
        if self.batch_size % self.microbatches:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of microbatches {self.microbatches}")
        if self.capacity_factor is not None and self.max_drop_rate is None:
            raise ValueError("state max_drop_rate where there is a capacity_factor (0.1 stops at a tenth dropped; 1 never stops)")
        if self.capacity_factor is None and self.max_drop_rate is not None:
            raise ValueError("max_drop_rate has no effect without a capacity_factor: nothing is dropped; leave it out")
        if self.tokens is not None and self.tokens < self.batch_size * self.seq_len:
            raise ValueError(f"tokens {self.tokens} is less than one step of {self.batch_size * self.seq_len}")
        return self


# --- the machine -----------------------------------------------------------------------------------------------


# --- the run ---------------------------------------------------------------------------------------------------


class Evaluation(Section):
    """Held-out loss on `data.eval`: every `every_steps` and at the end, on `batches` batches (null: all).

    drift_batches: on how many of them the routing of a model with adapters is compared with that of its base, which takes
    a second forward pass (null: 4 where there are adapters and routers; 0: none).
    """

    every_steps: Positive = 100
    batches: Positive | None = None
    drift_batches: NonNegative | None = None


class Checkpoint(Section):
    """When the run's state is saved, and how many saves stay: the last `keep_last`, plus the best held-out loss."""

    every_steps: Positive = 100
    every_minutes: PositiveFloat | None = 30.0
    keep_last: Positive = 2
    keep_best: bool = True


class Metrics(Section):
    """Where figures go besides the terminal and `metrics.jsonl`."""

    every_steps: Positive = 1
    tensorboard: bool = True


class Config(Section):
    """One complete run. export: none lets an architecture train that no file format has words for."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    run_dir: LocalPath
    seed: NonNegative = 0
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
            raise ValueError("state model (an architecture, trained from random weights) or init_from (a checkpoint)")
        if self.model is not None:
            check_model(self, self.model)
        if self.data is not None:
            check_records(self.objective, self.data)
        check_batch(self)
        if self.compute.attention == "cudnn" and self.compute.dtype == "float32":
            raise ValueError("compute.attention cudnn takes 16-bit numbers; set compute.dtype to bfloat16, or attention to auto")
        return self


def check_batch(config: Config) -> None:
    """Raise ValueError where a microbatch, or a sequence, does not divide over the mesh."""
    mesh, train = config.mesh, config.train
    replicas = mesh.data * mesh.fsdp * mesh.expert
    per_microbatch = train.batch_size // train.microbatches
    if replicas > 0 and per_microbatch % replicas:
        raise ValueError(
            f"batch_size {train.batch_size} / microbatches {train.microbatches} = {per_microbatch} sequences do not divide "
            f"over mesh data x fsdp x expert = {replicas}; use a multiple of {replicas * train.microbatches}"
        )
    chunks = 1 if mesh.context == 1 else 2 * mesh.context  # two for each device, so that all have as much to attend to
    if mesh.context > 0 and train.seq_len % chunks:
        down = train.seq_len // chunks * chunks
        raise ValueError(
            f"train.seq_len {train.seq_len} does not divide into two chunks for each of mesh.context {mesh.context}; "
            f"use a multiple of {chunks}: {f'{down} or ' if down else ''}{down + chunks}"
        )
    if mesh.context > 0 and config.compute.attention == "splash" and train.seq_len % (128 * chunks):
        raise ValueError(
            f"compute.attention splash wants a train.seq_len of whole {128 * chunks}s"
            f"{'' if chunks == 1 else f' on mesh.context {mesh.context}'}, not {train.seq_len}; use auto"
        )


def check_model(config: Config, model: Model) -> None:
    """Raise ValueError where `model` (stated, or read from `init_from`) does not go with the rest of `config`."""
    mesh, loss, attention = config.mesh, config.loss, model.attention
    _divides(mesh.fsdp, "fsdp", model.model_dim, "model_dim")
    _divides(mesh.tensor, "tensor", attention.num_kv_heads, "num_kv_heads")
    _divides(mesh.tensor, "tensor", model.ffn.ffn_dim, "ffn_dim")
    _divides(mesh.tensor, "tensor", model.vocab_size, "vocab_size")
    if config.train.seq_len > model.max_seq_len:
        raise ValueError(f"train.seq_len {config.train.seq_len} exceeds the model's max_seq_len {model.max_seq_len}")
    if config.evaluation.drift_batches and (config.lora is None or not isinstance(model.ffn, MoeFfn)):
        raise ValueError("evaluation.drift_batches compares the routing of adapters with their base's; here is none: leave it out")
    if config.compute.transport != "auto" and mesh.expert == 1:
        raise ValueError(f"compute.transport {config.compute.transport} has no effect where mesh.expert is 1; leave it out")
    if (has := without_format(model)) and config.export != "none":
        raise ValueError(f"no file format has a place for {has} of family {model.family}; set export: none to train it anyway")
    if not has and config.export == "none":
        raise ValueError(f"export: none has no effect on family {model.family}, which has its formats; leave it out")
    coefs = {"load_balance_loss_coef": loss.load_balance_loss_coef, "router_z_loss_coef": loss.router_z_loss_coef}
    if isinstance(model.ffn, MoeFfn):
        _divides(mesh.expert, "expert", model.ffn.num_experts, "num_experts")
        if (config.lora is None or config.lora.trains_router) and None in coefs.values():
            missing = ", ".join(f"loss.{k}" for k, v in coefs.items() if v is None)
            raise ValueError(f"state {missing} where routers are trained (0.01 and 0.001 are usual; 0 is off)")
        moves = model.ffn.router.bias and (config.lora is None or "ffn.router" in config.lora.train)
        if moves and loss.bias_update_rate is None:
            raise ValueError("state loss.bias_update_rate where routers have a bias (0.001 is usual; 0 is off)")
        if not moves and loss.bias_update_rate is not None:
            why = "is frozen" if model.ffn.router.bias else "is not there (model.ffn.router.bias)"
            raise ValueError(f"loss.bias_update_rate has no effect: the routers' bias {why}; leave it out")
    else:
        if mesh.expert != 1:
            raise ValueError(f"mesh.expert is {mesh.expert}, but a {model.family} model has no experts; use fsdp or data")
        if config.train.capacity_factor is not None:
            raise ValueError("train.capacity_factor is of experts, but the model has none; leave it out")
        if any(coefs.values()) or loss.bias_update_rate is not None:
            raise ValueError("loss has router coefficients, but the model has no router; leave them out")


def _divides(size: int, axis: str, dim: int, name: str) -> None:
    if size > 0 and dim % size:
        nearest = next(n for n in range(size, 0, -1) if dim % n == 0)
        raise ValueError(f"mesh.{axis} {size} does not divide {name} {dim}; use {nearest}")

"""Learning-rate schedules, optimizers, and the losses that balance routers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.section import (
    Decay,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)


class ConstantSchedule(Section):
    """Linear warm-up, then a constant learning rate."""

    name: Literal["constant"]
    warmup_steps: NonNegative = 0


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine period down to `final_fraction` of the peak at the last step."""

    name: Literal["cosine"]
    warmup_steps: NonNegative = 0
    final_fraction: Fraction = 0.1


class LinearSchedule(Section):
    """Linear warm-up, then a linear decay to `final_fraction` of the peak at the last step."""

    name: Literal["linear"]
    warmup_steps: NonNegative = 0
    final_fraction: Fraction = 0.0


class WsdSchedule(Section):
    """Warm-up, stable, decay (WSD, arXiv:2404.06395).

    The last `decay_steps` steps decay linearly to `final_fraction` of the peak.
    """

    name: Literal["wsd"]
    warmup_steps: NonNegative = 0
    decay_steps: Positive
    final_fraction: Fraction = 0.0


Schedule = Annotated[ConstantSchedule | CosineSchedule | LinearSchedule | WsdSchedule, Field(discriminator="name")]
"""The tagged union of learning-rate schedules."""


Rounding = Literal["nearest", "stochastic", "float32_master"]
"""How the sum of a bfloat16 weight and its update is rounded."""


class _OptimizerBase(Section):
    """The settings that all optimizers have.

    rounding: how updates reach weights of `compute.param_dtype` bfloat16 in full training. With nearest, updates below 1/512 of a
    weight vanish. float32_master keeps float32 copies in the optimizer state, and rounds the weights from them; stochastic rounds
    up or down at random, right on average. Both keep the moments in float32: with AdamW 14 and 10 bytes per parameter instead of
    6. The setting is fixed when a run starts.
    """

    learning_rate: PositiveFloat
    schedule: Schedule = ConstantSchedule(name="constant")
    weight_decay: NonNegativeFloat = 0.0
    no_decay: tuple[Literal["norms", "biases", "router", "embeddings"], ...] = ("norms", "biases")
    max_grad_norm: PositiveFloat | None = 1.0
    rounding: Rounding = "nearest"


class AdamW(_OptimizerBase):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    name: Literal["adamw"]
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: PositiveFloat = 1e-8


class Lion(_OptimizerBase):
    """Lion: updates by the sign of an interpolated momentum (arXiv:2302.06675)."""

    name: Literal["lion"]
    b1: Decay = 0.9
    b2: Decay = 0.99


class Adafactor(_OptimizerBase):
    """Adafactor: factored second moments (arXiv:1804.04235)."""

    name: Literal["adafactor"]
    decay_rate: Decay = 0.8
    min_dim_size_to_factor: Positive = 128


class Muon(_OptimizerBase):
    """Muon: orthogonalized momentum (https://kellerjordan.github.io/posts/muon).

    It applies to the matrices of attention and of the (expert) FFN, which are selected by name. Embeddings, head, router and norms
    use AdamW with `adamw_learning_rate`.
    """

    name: Literal["muon"]
    momentum: Decay = 0.95
    ns_steps: Positive = 5
    nesterov: bool = True
    adamw_learning_rate: PositiveFloat
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: PositiveFloat = 1e-8


Optimizer = Annotated[AdamW | Lion | Adafactor | Muon, Field(discriminator="name")]
"""The tagged union of optimizers."""


class Loss(Section):
    """Settings that keep routers balanced.

    load_balance_loss_coef, router_z_loss_coef: coefficients of the two router losses, applied per layer. Full training of a
    sparse model must state them. bias_update_rate: how far one step moves the bias of a router that has one: up for an expert
    with less than the mean load of the step, down for one with more (DeepSeek-V3 uses 0.001). balance_over: the tokens whose
    loads the balance loss multiplies. With microbatch it is the mean of the microbatches' losses, weighted by their tokens. With
    step (arXiv:2501.11873) loss and gradient are those of one large batch, whatever train.microbatches is; if that is more than
    one, each step begins with a forward pass that counts the loads, a quarter to a third more work.
    """

    load_balance_loss_coef: NonNegativeFloat | None = None
    router_z_loss_coef: NonNegativeFloat | None = None
    bias_update_rate: NonNegativeFloat | None = None
    balance_over: Literal["microbatch", "step"] = "microbatch"

    def needs_routing_pass(self, microbatches: int) -> bool:
        """Return whether each step begins with a forward pass that counts the loads of all microbatches."""
        return self.balance_over == "step" and microbatches > 1 and bool(self.load_balance_loss_coef)

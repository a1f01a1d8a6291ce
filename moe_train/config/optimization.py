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
    """Steps over which the learning rate rises linearly from zero."""


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine period down to `final_fraction` of the peak at the last step."""

    name: Literal["cosine"]
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from zero."""
    final_fraction: Fraction = 0.1
    """Learning rate at the last step, as a fraction of the peak."""


class LinearSchedule(Section):
    """Linear warm-up, then a linear decay to `final_fraction` of the peak at the last step."""

    name: Literal["linear"]
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from zero."""
    final_fraction: Fraction = 0.0
    """Learning rate at the last step, as a fraction of the peak."""


class WsdSchedule(Section):
    """Warm-up, stable, decay (WSD, arXiv:2404.06395).

    The last `decay_steps` steps decay linearly to `final_fraction` of the peak.
    """

    name: Literal["wsd"]
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from zero."""
    decay_steps: Positive
    """Number of last steps over which the learning rate decays linearly; a tenth of the run is usual."""
    final_fraction: Fraction = 0.0
    """Learning rate at the last step, as a fraction of the peak."""


Schedule = Annotated[ConstantSchedule | CosineSchedule | LinearSchedule | WsdSchedule, Field(discriminator="name")]
"""The tagged union of learning-rate schedules."""


Rounding = Literal["nearest", "stochastic", "float32_master"]
"""How the sum of a bfloat16 weight and its update is rounded."""


class _OptimizerBase(Section):
    """The settings that all optimizers have."""

    learning_rate: PositiveFloat
    """Peak learning rate. Start with 1e-4 to 2e-4 for LoRA and 1e-5 for a full fine-tune."""
    schedule: Schedule = ConstantSchedule(name="constant")
    """Course of the learning rate over the run."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay per step, multiplied by the learning rate. 0.1 is usual in pretraining."""
    no_decay: tuple[Literal["norms", "biases", "router", "embeddings"], ...] = ("norms", "biases")
    """Kinds of weights that weight decay leaves out."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Global norm to which larger gradients are scaled down; null does not limit them."""
    rounding: Rounding = "nearest"
    """How updates reach weights of `compute.param_dtype` bfloat16 in full training. With nearest, updates below 1/512 of a weight
    vanish. float32_master keeps float32 copies in the optimizer state, and rounds the weights from them; stochastic rounds up or
    down at random, right on average. Both keep the moments in float32: with AdamW 14 and 10 bytes per parameter instead of 6. The
    setting is fixed when a run starts.
    """


class AdamW(_OptimizerBase):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    name: Literal["adamw"]
    b1: Decay = 0.9
    """Decay of the mean of gradients per step."""
    b2: Decay = 0.95
    """Decay of the mean of squared gradients per step. 0.95 suits large batches; 0.999 is torch's default."""
    eps: PositiveFloat = 1e-8
    """Constant added to the root of the second moment."""


class Lion(_OptimizerBase):
    """Lion: updates by the sign of an interpolated momentum (arXiv:2302.06675)."""

    name: Literal["lion"]
    b1: Decay = 0.9
    """Interpolation between momentum and gradient whose sign is the update."""
    b2: Decay = 0.99
    """Decay of the momentum per step."""


class Adafactor(_OptimizerBase):
    """Adafactor: factored second moments (arXiv:1804.04235)."""

    name: Literal["adafactor"]
    decay_rate: Decay = 0.8
    """Exponent by which the decay of second moments approaches 1 as steps pass."""
    min_dim_size_to_factor: Positive = 128
    """Matrices with both dims at least this large store factored second moments."""


class Muon(_OptimizerBase):
    """Muon: orthogonalized momentum (https://kellerjordan.github.io/posts/muon).

    It applies to the matrices of attention and of the (expert) FFN, and to those of a trained tower and its projector, which are
    selected by name; a convolution, such as the map of patches, is the matrix of its windows. Embeddings, head, router, norms and
    biases use AdamW with `adamw_learning_rate`: lookups and vectors have no directions to balance, and heads and routers train
    worse with it. A run says how many arrays each of the two updates.
    """

    name: Literal["muon"]
    momentum: Decay = 0.95
    """Decay of the momentum per step."""
    ns_steps: Positive = 5
    """Newton-Schulz iterations that orthogonalize an update."""
    nesterov: bool = True
    """Whether the gradient enters the update a second time, after the momentum."""
    adamw_learning_rate: PositiveFloat
    """Peak learning rate of embeddings, head, router, norms and biases, which use AdamW."""
    b1: Decay = 0.9
    """Decay of AdamW's mean of gradients per step."""
    b2: Decay = 0.95
    """Decay of AdamW's mean of squared gradients per step."""
    eps: PositiveFloat = 1e-8
    """Constant added to the root of AdamW's second moment."""


Optimizer = Annotated[AdamW | Lion | Adafactor | Muon, Field(discriminator="name")]
"""The tagged union of optimizers."""


class Loss(Section):
    """Settings that keep routers balanced."""

    load_balance_loss_coef: NonNegativeFloat | None = None
    """Coefficient of the load-balance loss, applied per layer; 0.01 is usual. Full training of a sparse model must state it; null
    is 0 where routers are frozen.
    """
    router_z_loss_coef: NonNegativeFloat | None = None
    """Coefficient of the z-loss (squared log-sum-exp of router logits), applied per layer; 0.001 is usual. Full training of a
    sparse model must state it; null is 0 where routers are frozen.
    """
    bias_update_rate: NonNegativeFloat | None = None
    """How far one step moves the bias of a router that has one: up for an expert with less than the mean load of the step, down for
    one with more. DeepSeek-V3 uses 0.001.
    """
    balance_over: Literal["sequence", "microbatch", "step"] = "microbatch"
    """Tokens whose loads the balance loss multiplies. With microbatch it is the mean of the microbatches' losses, weighted by their
    tokens. With sequence (DeepSeek-V3, arXiv:2412.19437, eq. 17) every row of train.seq_len positions is balanced by itself, the
    strictest. With step (arXiv:2501.11873) loss and gradient are those of one large batch, whatever train.microbatches is; if that
    is more than one, each step begins with a forward pass that counts the loads, a quarter to a third more work.
    """

    def needs_routing_pass(self, microbatches: int) -> bool:
        """Return whether each step begins with a forward pass that counts the loads of all microbatches."""
        return self.balance_over == "step" and microbatches > 1 and bool(self.load_balance_loss_coef)

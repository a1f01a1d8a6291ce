"""The objectives that learn from judged answers: preference pairs, and answers labelled as good or bad."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.section import NonNegativeFloat, PositiveFloat, Section

LabelNoise = Annotated[float, Field(ge=0, lt=0.5)]
"""A share of wrong labels: from 0 to below one half."""

PairLoss = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo"]
"""Losses of preference pairs."""

WITHOUT_REFERENCE = ("simpo", "orpo")
"""Losses that use no reference model."""


class Preference(Section):
    """Learning from pairs of a preferred and a rejected answer. Losses are those of TRL 1.16; `docs/guides/preferences.md`
    has the formulas.
    """

    records: ClassVar[tuple[str, ...]] = ("preference",)
    """Names of the record kinds that the objective reads."""
    loss_unit: ClassVar[str] = "loss of a pair of answers"
    """What the loss is, in documents and charts."""

    name: Literal["preference"]
    loss: PairLoss = "sigmoid"
    """sigmoid (DPO, arXiv:2305.18290), ipo (2310.12036), hinge (SLiC, 2305.10425), robust (2403.00409), apo_zero and apo_down
    (2408.06266) compare with the reference: the model without its adapters, or before full training. simpo (2405.14734) and orpo
    (2403.07691) use none.
    """
    beta: PositiveFloat = 0.1
    """Strength of the preference: the factor of the log-ratios, for ipo the regularization, for orpo the weight of the odds ratio.
    2 is usual for simpo.
    """
    label_smoothing: LabelNoise = 0.0
    """Share of pairs assumed to be labelled the wrong way round; only for robust, which needs it, and simpo."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the mean negative log-likelihood of chosen answers (RPO, arXiv:2404.19733), which keeps their probability from
    falling. orpo has such a term of its own.
    """
    length_normalized: bool = False
    """Whether log-ratios are divided by the tokens of their answers (`sigmoid_norm` of TRL); only for sigmoid, hinge and robust.
    ipo, simpo and orpo always do so.
    """
    margin: NonNegativeFloat | None = None
    """Reward margin that chosen answers should have (gamma of simpo, for which null is 0.5); only for simpo."""
    shared_prompt: bool | Literal["auto"] = "auto"
    """Whether a row holds the prompt of a pair once, and both answers attend to it. `auto` does so where that saves at least a
    tenth of all positions and the attention kernel can do it (all but splash, the one for TPUs). The loss of a pair is the same,
    but a row holds more pairs, and routers count each prompt once, in their balance loss, z-loss and drift too.
    """

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with a reference."""
        return self.loss not in WITHOUT_REFERENCE

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label_smoothing and self.loss not in ("robust", "simpo"):
            raise ValueError(f"label_smoothing has no effect with loss {self.loss}; set loss to robust, or leave it out")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss robust without label_smoothing is sigmoid; state label_smoothing, or set loss to sigmoid")
        if self.length_normalized and self.loss not in ("sigmoid", "hinge", "robust"):
            raise ValueError(f"length_normalized has no effect with loss {self.loss}; leave it out")
        if self.margin is not None and self.loss != "simpo":
            raise ValueError(f"margin has no effect with loss {self.loss}; set loss to simpo, or leave it out")
        if self.sft_weight and self.loss == "orpo":
            raise ValueError("sft_weight has no effect with loss orpo, which has such a term of its own; leave it out")
        return self


class UnpairedPreference(Section):
    """Learning from answers that are labelled as good or bad, one by one."""

    records: ClassVar[tuple[str, ...]] = ("labelled",)
    """Names of the record kinds that the objective reads."""
    loss_unit: ClassVar[str] = "loss of an answer"
    """What the loss is, in documents and charts."""

    name: Literal["unpaired_preference"]
    loss: Literal["kto"] = "kto"
    """kto (arXiv:2402.01306) compares each answer's log-ratio with the mean log-ratio of mismatched answers."""
    beta: PositiveFloat = 0.1
    """Factor of the log-ratios."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of good answers. With few of them, raise it so that both kinds weigh about the same in sum."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of bad answers."""

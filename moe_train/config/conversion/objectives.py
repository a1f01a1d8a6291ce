"""What a run of another trainer learns from other than the next token: preference pairs, marks, and rewards."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

from moe_train.config.conversion.draft import Draft
from moe_train.config.preferences import PairLoss

LOSSES = get_args(PairLoss)


class Pairs(NamedTuple):
    """Settings of a loss of preference pairs, as TRL means them."""

    loss: str
    """Name of the loss as TRL has it."""
    beta: float
    """Strength of the preference; for orpo the weight of the odds ratio."""
    label_smoothing: float = 0.0
    """Share of pairs assumed to be labelled the wrong way round."""
    sft_weight: float = 0.0
    """Weight of the mean negative log-likelihood of chosen answers."""
    margin: float | None = None
    """Margin of simpo (gamma)."""


def put_pairs(draft: Draft, key: str, pairs: Pairs) -> None:
    """Set the objective for preference pairs.

    Args:
        draft: the config.
        key: their name of the loss, for remarks.
        pairs: the settings of the loss.
    """
    loss = pairs.loss
    section: dict[str, Any] = {"name": "preference", "loss": loss, "beta": pairs.beta}
    if loss == "sigmoid_norm":
        section |= {"loss": "sigmoid", "length_normalized": True}
    elif loss not in LOSSES:
        draft.note(key, f"{loss} is not supported; written is sigmoid (DPO); {', '.join(LOSSES)} are there")
        section["loss"] = "sigmoid"
    elif loss == "robust" and not pairs.label_smoothing:
        section["loss"] = "sigmoid"  # equal to it
    if pairs.label_smoothing and loss in ("robust", "simpo"):
        section["label_smoothing"] = pairs.label_smoothing
    elif pairs.label_smoothing:
        draft.note(
            "label_smoothing", f"{loss} has none here (value {pairs.label_smoothing:g}); loss: robust corrects for wrong labels"
        )
    if pairs.sft_weight and loss != "orpo":
        section["sft_weight"] = pairs.sft_weight
    if loss == "simpo":
        section["margin"] = pairs.margin
    draft.put("objective", {name: value for name, value in section.items() if value is not None})


def put_marks(draft: Draft, beta: float, desirable_weight: float, undesirable_weight: float) -> None:
    """Set the objective for answers marked as good or bad (KTO); theirs have a weight of 1 where none is stated."""
    section: dict[str, Any] = {"name": "unpaired_preference", "loss": "kto", "beta": beta}
    if desirable_weight != 1:
        section["desirable_weight"] = desirable_weight
    if undesirable_weight != 1:
        section["undesirable_weight"] = undesirable_weight
    draft.put("objective", section)


def put_reward(draft: Draft) -> None:
    """Set the objective of a reward model."""
    draft.put("objective", {"name": "reward"})
    draft.put("objective.center_weight", draft.number("center_rewards_coefficient"))


def pair_record(prompt: str | None, chosen: str = "chosen", rejected: str = "rejected") -> dict[str, Any]:
    """Return our record section for preference pairs; `prompt` is None if both answers begin with it."""
    return {"name": "preference", "prompt": prompt, "chosen": chosen, "rejected": rejected}


def objective_name(draft: Draft) -> str:
    """Return the name of the objective that the draft has."""
    return str(draft.tree.get("objective", {}).get("name", "next_token"))

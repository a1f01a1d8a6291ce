"""Compare logits on fixed prompts with a reference: first the experts that routers chose, then the logits that these influence."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.proof.logits import ProbeLogits, Prompts


class Reference(NamedTuple):
    """Logits as a record keeps them: the largest ones of each position, and the chosen experts.

    The names of the fields are keys of the record.
    """

    top_ids_PTn: np.ndarray
    top_logits_PTn: np.ndarray
    experts_LPTA: np.ndarray | None
    """Ids in ascending order; None for a dense model."""


class Difference(NamedTuple):
    """The difference between logits and a reference. The names of the fields are keys of the record."""

    logits: float
    """Largest difference over the largest logit, among the compared positions."""
    positions: int
    """Number of compared positions."""
    excluded: int
    """Number of positions that follow a near-tie with a different outcome, and are not compared."""
    choices: int
    """Number of compared router choices."""
    near_ties: int
    """Number of these with a different outcome that were near-ties."""
    wrong: int
    """Number of these with a different outcome that were not near-ties."""
    first_wrong: tuple[int, int, int] | None
    """Layer, prompt and position of the first wrong choice; None without one."""


def to_reference(logits: ProbeLogits, model: config.Model, top: int | None = None) -> Reference:
    """Reduce logits to a reference.

    Args:
        logits: the logits on all prompts.
        model: the architecture.
        top: number of logits per position to keep; None for all.
    """
    ids = np.argsort(-logits.logits_PTV, axis=-1, kind="stable")[..., :top]
    return Reference(ids, np.take_along_axis(logits.logits_PTV, ids, axis=-1), _chosen_experts(logits, model))


def compare_logits(logits: ProbeLogits, reference: Reference, prompts: Prompts, model: config.Model, near: float) -> Difference:
    """Compare logits with a reference.

    A near-tie with a different outcome changes all later layers and the logits from that position on, so these are not compared.

    Args:
        logits: the logits on all prompts.
        reference: the reference.
        prompts: the prompts of both.
        model: the architecture.
        near: a router's choice is a near-tie if the last chosen logit and the first one not chosen differ by less than this
            share of the largest.

    Raises:
        ValueError: the reference is not of this model.
    """
    is_token_PT = prompts.positions_PT >= 0
    choices = _compare_choices(logits, reference, is_token_PT, model, near)
    compared_PTn = np.take_along_axis(logits.logits_PTV, reference.top_ids_PTn, axis=-1)
    # The largest logit of all replaces that of the reference's top token, so that a different top token is noticed.
    compared_PTn[..., 0] = logits.logits_PTV.max(axis=-1)
    errors = np.abs(compared_PTn - reference.top_logits_PTn)[choices.comparable_PT]
    largest = float(np.abs(reference.top_logits_PTn).max())
    relative_error = math.inf
    if np.all(np.isfinite(errors)) and largest:
        relative_error = float(errors.max(initial=0.0)) / largest
    positions = int(choices.comparable_PT.sum())
    return Difference(
        logits=relative_error,
        positions=positions,
        excluded=int(is_token_PT.sum()) - positions,
        choices=choices.choices,
        near_ties=choices.near_ties,
        wrong=choices.wrong,
        first_wrong=choices.first_wrong,
    )


class _Choices(NamedTuple):
    """The comparison of the routers' choices; the counts are those of `Difference`."""

    comparable_PT: np.ndarray
    """Whether a position is a token that no different choice has influenced."""
    choices: int
    near_ties: int
    wrong: int
    first_wrong: tuple[int, int, int] | None


def _compare_choices(
    logits: ProbeLogits, reference: Reference, is_token_PT: np.ndarray, model: config.Model, near: float
) -> _Choices:
    """Compare the experts that routers chose, layer by layer, at the positions that no earlier difference has influenced."""
    chosen_LPTA = _chosen_experts(logits, model)
    if chosen_LPTA is None or logits.routers_LPTE is None:
        return _Choices(is_token_PT, 0, 0, 0, None)
    if reference.experts_LPTA is None or reference.experts_LPTA.shape != chosen_LPTA.shape:
        raise ValueError("the recorded choices of routers are not of a model with these layers and experts; export again")
    A = chosen_LPTA.shape[-1]
    comparable_PT = is_token_PT
    count = 0
    near_ties = 0
    wrong = 0
    first_wrong = None
    for i, layer in enumerate(config.sparse_layers(model)):
        sorted_PTE = -np.sort(-logits.routers_LPTE[i], axis=-1)
        gap_PT = np.ones(is_token_PT.shape)
        # If every expert is chosen, no choice can differ, and any gap will do.
        if sorted_PTE.shape[-1] > A:
            gap_PT = sorted_PTE[..., A - 1] - sorted_PTE[..., A]
        is_near_tie_PT = gap_PT < near * np.abs(sorted_PTE).max()
        differs_PT = np.any(chosen_LPTA[i] != reference.experts_LPTA[i], axis=-1) & comparable_PT
        count += int(comparable_PT.sum())
        near_ties += int((differs_PT & is_near_tie_PT).sum())
        wrong_indices = np.argwhere(differs_PT & ~is_near_tie_PT)
        wrong += len(wrong_indices)
        if len(wrong_indices) and first_wrong is None:
            prompt, position = wrong_indices[0]
            first_wrong = layer, int(prompt), int(position)
        # Attention spreads a different choice to all later positions, but not to earlier ones.
        comparable_PT = comparable_PT & ~np.maximum.accumulate(differs_PT, axis=1)
    return _Choices(comparable_PT, count, near_ties, wrong, first_wrong)


def _chosen_experts(logits: ProbeLogits, model: config.Model) -> np.ndarray | None:
    """Return the chosen experts in ascending order, (L, P, T, A); None for a dense model."""
    if logits.routers_LPTE is None:
        return None
    assert isinstance(model.ffn, config.MoeFfn)
    by_logit = np.argsort(-logits.routers_LPTE, axis=-1, kind="stable")
    return np.sort(by_logit[..., : model.ffn.experts_per_token], axis=-1)

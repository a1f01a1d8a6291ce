"""The kinds of routers, which choose and weight the experts of each token."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.section import Positive, PositiveFloat, Section


class SoftmaxRouter(Section):
    """A router whose weights are the softmax over the logits of the selected experts (Mixtral, arXiv:2401.04088)."""

    name: Literal["softmax"]
    bias: bool = False
    """Whether each expert has a bias that is added to its probability for the selection only, never to the weights. It is not
    learned by gradient: `loss.bias_update_rate` sets how far each step moves it towards an even load (arXiv:2408.15664).
    """
    # A dump omits this key at its default: files that store a dump (GGUF) keep their bytes, and older readers still read them.
    scale: Annotated[PositiveFloat, Field(exclude_if=lambda scale: scale == 1)] = 1.0
    """Factor on the weights of the selected experts (`routed_scaling_factor` of Mistral Small 4)."""


class SigmoidRouter(Section):
    """A router whose weights are the sigmoids of the selected experts' logits, divided by their sum, times `scale`.

    This is the router of DeepSeek-V3 (arXiv:2412.19437, eq. 12 to 16; section 2.1.2 for groups of experts).
    """

    name: Literal["sigmoid"]
    bias: bool = False
    """Whether each expert has a bias that is added to its sigmoid for the selection only; `loss.bias_update_rate` moves it."""
    scale: PositiveFloat = 1.0
    """Factor on the weights of the selected experts (`routed_scaling_factor` of DeepSeek-V3, which has 2.5)."""
    num_groups: Positive = 1
    """Number of consecutive groups of experts (`n_group`); 1 puts all experts into one group."""
    groups_per_token: Positive = 1
    """Number of best groups among whose experts a token selects (`topk_group`). The score of a group is the sum of its two best
    experts, biases included.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.groups_per_token > self.num_groups:
            raise ValueError(f"groups_per_token {self.groups_per_token} exceeds num_groups {self.num_groups}; lower it")
        if self.groups_per_token == self.num_groups > 1:
            raise ValueError(f"groups_per_token {self.groups_per_token} equals num_groups, so it limits nothing; leave both out")
        return self


Router = Annotated[SoftmaxRouter | SigmoidRouter, Field(discriminator="name")]
"""The tagged union of routers."""

"""Numbers per token, counted from the weights of both kinds of attention."""

from __future__ import annotations

import jax
import pytest

from moe_train import config
from moe_train.plan.attention_sizes import attention_sizes
from tests.random_parameters import abstract
from tests.tiny import LATENT, MIXTRAL, ONE
from tests.weights.mistral.models import MISTRAL4

DIRECT = MISTRAL4.model_copy(update={"attention": LATENT.model_copy(update={"q_lora_rank": None})})


@pytest.mark.parametrize("model", [MIXTRAL, MISTRAL4, DIRECT], ids=["grouped", "latent", "latent, direct queries"])
def test_projections_are_those_of_the_weights(model: config.Model) -> None:
    with jax.set_mesh(ONE):
        weights = {path.rpartition("attention.")[2]: x.shape[1:] for path, x in abstract(model).items() if "attention." in path}
    outputs = {path: x[1:] for path, x in weights.items() if path.endswith("proj.weight") and not path.startswith("o_proj")}
    sizes = attention_sizes(model)
    # Projections to heads have (heads, dims) as outputs, those into latents a single dim.
    assert sizes.projections_of_heads == sum(shape[0] * shape[1] for shape in outputs.values() if len(shape) == 2)
    assert sizes.latents == sum(shape[0] for shape in outputs.values() if len(shape) == 1)
    heads, dims, _ = weights["o_proj.weight"]
    assert (sizes.outputs, sizes.num_heads) == (heads * dims, heads)
    # `tensor` splits outputs of projections to heads, so the gradients of their inputs are sums over it.
    inputs = sum(weights[path][0] for path, shape in outputs.items() if len(shape) == 2)
    shared_key = 0 if isinstance(model.attention, config.GroupedQueryAttention) else model.attention.qk_rope_head_dim
    assert sizes.input_gradients == inputs + shared_key


def test_keys_of_all_heads_are_what_the_kernel_takes() -> None:
    sizes = attention_sizes(MISTRAL4)
    assert (sizes.queries, sizes.keys, sizes.values, sizes.expanded) == (4 * 18, 4 * 18, 4 * 6, 4 * 16)

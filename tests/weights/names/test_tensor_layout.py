"""The rows of a layout that a model uses."""

from __future__ import annotations

from moe_train import config
from moe_train.weights import names
from tests.tiny import DEEPSEEK_V3, DENSE, LATENT, MIXTRAL


def test_rows_follow_the_kinds_of_attention_and_feed_forward_part() -> None:
    layout = names.HUGGING_FACE
    direct = LATENT.model_copy(update={"q_lora_rank": None})
    assert layout.attention_rows(MIXTRAL.attention) == layout.grouped_query
    assert {row.path for row in layout.latent} - {row.path for row in layout.attention_rows(LATENT)} == {"attention.q_proj.weight"}
    assert len(layout.attention_rows(direct)) == len(layout.latent) - 3
    assert layout.rows_of_tokens(DENSE) == layout.dense
    assert isinstance(DEEPSEEK_V3.ffn, config.MoeFfn)
    assert layout.rows_of_tokens(DEEPSEEK_V3.ffn) == (layout.router, layout.router_bias, *layout.shared)
    assert layout.rows_of_tokens(MIXTRAL.ffn) == (layout.router,)

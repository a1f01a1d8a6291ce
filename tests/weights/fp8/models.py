"""Tiny models whose matrices are multiples of the blocks of FP8 files."""

from __future__ import annotations

from moe_train import config
from tests.tiny import YARN

WIDE = config.Model(
    family="mixtral",
    vocab_size=24,
    model_dim=128,
    num_layers=1,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=64),
    ffn=config.MoeFfn(name="moe", ffn_dim=256, num_experts=2, experts_per_token=1),
)
"""Every matrix is a multiple of 128 x 128."""
WIDE_LATENT = config.Model(
    family="deepseek_v3",
    vocab_size=24,
    model_dim=128,
    num_layers=2,
    attention=config.MultiHeadLatentAttention(
        name="mla",
        num_heads=2,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        scale_correction="mscale_squared",
    ),
    ffn=config.MoeFfn(
        name="moe",
        ffn_dim=256,
        num_experts=2,
        experts_per_token=1,
        router=config.SigmoidRouter(name="sigmoid", bias=True, scale=2.5, num_groups=1, groups_per_token=1),
        num_shared_experts=1,
        dense_layers=config.DenseLayers(count=1, ffn_dim=256),
    ),
    rope=YARN,
    max_seq_len=128,
)
"""Blocks divide every matrix but `kv_a_proj`, of 192 outputs, as in DeepSeek-V3 and Mistral Small 4."""
WIDE_FUSED = WIDE_LATENT.model_copy(
    update={
        "family": "mistral4",
        "attention": WIDE_LATENT.attention.model_copy(
            update={"query_scaling": config.QueryScaling(beta=0.1, original_max_seq_len=8), "scale_correction": "none"}
        ),
        "ffn": WIDE_LATENT.ffn.model_copy(update={"router": config.SoftmaxRouter(name="softmax")}),
    }
)
"""The same with the experts of a layer in one tensor."""

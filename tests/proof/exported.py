"""A small model with adapters, and its proved export in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.data.records.normal_form import Conversation
from moe_train.weights.texts import Texts
from tests.tiny import ONE

MODEL = config.Model(
    family="mixtral",
    vocab_size=288,
    model_dim=32,
    num_layers=2,
    max_seq_len=64,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=32, num_experts=4, experts_per_token=2),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),))
LAYOUTS = [("hf", "float32"), ("hf", "bfloat16"), ("mistral", "float32"), ("gguf", "q8_0"), ("gguf", "bf16")]
CHAT = Conversation([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}], [])


def make(out: Path, weights: dict[str, jax.Array], texts: Texts, layout: Any, dtype: str, **options: Any) -> dict[str, Any]:
    lora = LORA if any(".lora_" in path for path in weights) else None
    with jax.set_mesh(ONE):
        stated = {
            "layout": layout,
            "dtype": dtype,
            "lora": lora,
            "merge": lora is not None,
            "texts": texts,
            "conversations": [CHAT],
        }
        return write_and_prove.export_model(weights, MODEL, out, write_and_prove.WriteOptions(**{**stated, **options}))

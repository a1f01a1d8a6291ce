"""A tiny model and the config of a run that trains it."""

from __future__ import annotations

import json
from typing import Any

from moe_train import config

MODEL = {
    "family": "mixtral",
    "vocab_size": 320,
    "model_dim": 16,
    "num_layers": 2,
    "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
    "ffn": {"name": "moe", "ffn_dim": 16, "num_experts": 4, "experts_per_token": 2},
    "max_seq_len": 64,
}
LORA = {"targets": [{"modules": ["attention.*", "ffn.*"], "rank": 2, "alpha": 4.0}]}


def written(**sections: Any) -> config.Config:
    tree = {
        "name": "run",
        "run_dir": "runs/run",
        "train": {"steps": 3, "batch_size": 8, "seq_len": 32},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "loss": {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.001},
        **sections,
    }
    return config.Config.model_validate_json(json.dumps(tree))


def data(**settings: Any) -> dict[str, Any]:
    return {"train": [{"name": "files", "files": ["a.jsonl"], "record": {"name": "text"}}], **settings}

"""A small model with adapters, the run that training it would leave behind, and a mesh of one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax

from moe_train import config
from moe_train.checkpoint import identity, manager
from moe_train.checkpoint.metadata import CheckpointMetadata
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters
from moe_train.train.state import create_state

MODEL = config.Model(
    family="mixtral",
    vocab_size=300,
    model_dim=16,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=6),
    ffn=config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),))
MESH = config.Mesh(fsdp=2, expert=2, tensor=2)
ONE = make_mesh(config.Mesh(), jax.devices()[:1])


def save_run(directory: Path, weights: Parameters, tokenizer: HuggingFace, **more: Any) -> config.Config:
    """A run with one checkpoint, as training leaves it behind."""
    source = config.FileSource(name="files", files=("data.txt",), record=config.TextRecord(name="text"))
    named = config.HuggingFaceTokenizer(name="huggingface", path=str(tokenizer.path))
    sections: dict[str, Any] = {
        "name": "run",
        "run_dir": str(directory),
        "model": MODEL,
        "mesh": MESH,
        "data": config.Data(tokenizer=named, train=(source,)),
        "train": config.Train(steps=1, batch_size=4, seq_len=16),
        "optimizer": config.AdamW(name="adamw", learning_rate=1e-3),
        "loss": config.Loss(load_balance_loss_coef=0.02, router_z_loss_coef=0.0),
    }
    run = config.Config(**(sections | more))
    base = identity.base_origin(run.init_from) if run.init_from else None
    about = CheckpointMetadata(config=run.model_dump(mode="json"), row=0, data="", base=base)
    with manager.open_for_saving(directory, run.checkpoint) as checkpoints:
        trained_tower = () if run.vision is None else run.vision.train
        manager.save(checkpoints, 1, create_state(weights, optax.sgd(0.1), run.lora, trained_tower), about)
    return run

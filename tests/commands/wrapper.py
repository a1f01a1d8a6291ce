"""A vision wrapper around a text model, in files as transformers saves it, and a run of adapters that started from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.model.parameters import Parameters
from moe_train.weights import hf, names
from tests.commands import runs
from tests.random_parameters import random_parameters
from tests.tiny import ONE

TEXT = runs.MODEL.model_copy(update={"family": "mistral", "ffn": config.DenseFfn(name="dense", ffn_dim=12)})
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.up_proj"), rank=2, alpha=3.0),))
TOWER = ("vision_tower.transformer.layers.0.attention.q_proj.weight", "multi_modal_projector.linear_1.weight")


def save_wrapper(directory: Path, weights: Parameters, dtype: Any = np.float32) -> None:
    directory.mkdir()
    text = hf.write_model_config(TEXT, dtype="float32", bos_token_id=1, eos_token_id=2)
    fields = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    fields |= {"vision_config": {"model_type": "pixtral"}, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(fields))
    tensors = {name: np.ones((8, 8), dtype) for name in TOWER}
    for piece in names.weight_pieces(TEXT, names.hugging_face("language_model.model.", "language_model.")):
        tensors[piece.name] = np.ascontiguousarray(piece.to_file(np.asarray(weights[piece.path])[piece.lead]).astype(dtype))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def save_run_on_wrapper(directory: Path, tokenizer: HuggingFace, dtype: Any = np.float32) -> None:
    """`directory / "base"` and `directory / "run"`."""
    with jax.set_mesh(ONE):
        weights = random_parameters(TEXT, lora=LORA)
        save_wrapper(directory / "base", weights, dtype)
        sections = {"model": TEXT, "mesh": config.Mesh(), "loss": config.Loss(), "lora": LORA}
        runs.save_run(directory / "run", weights, tokenizer, init_from=str(directory / "base"), **sections)

"""A vision wrapper around a text model, in files as transformers saves it, and a run of adapters that started from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
VISION = {
    "model_type": "pixtral",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
    "hidden_act": "silu",
}
LAYER = "vision_tower.transformer.layers.0."
TOWER: dict[str, tuple[int, ...]] = {
    "vision_tower.patch_conv.weight": (8, 3, 2, 2),
    "vision_tower.ln_pre.weight": (8,),
    **{f"{LAYER}attention.{letter}_proj.weight": (8, 8) for letter in "qkvo"},
    f"{LAYER}feed_forward.gate_proj.weight": (12, 8),
    f"{LAYER}feed_forward.up_proj.weight": (12, 8),
    f"{LAYER}feed_forward.down_proj.weight": (8, 12),
    f"{LAYER}attention_norm.weight": (8,),
    f"{LAYER}ffn_norm.weight": (8,),
    "multi_modal_projector.norm.weight": (8,),
    "multi_modal_projector.patch_merger.merging_layer.weight": (8, 32),
    "multi_modal_projector.linear_1.weight": (16, 8),
    "multi_modal_projector.linear_2.weight": (16, 16),
}
"""Shapes of the tower and projector by name."""
WHISPER_ARGS: dict[str, Any] = {
    "encoder_args": {
        "audio_encoding_args": {"sampling_rate": 16000, "num_mel_bins": 4, "hop_length": 160, "window_size": 400},
        **{"dim": 8, "n_layers": 1, "head_dim": 4, "hidden_dim": 32, "n_heads": 2, "vocab_size": 12, "max_source_positions": 6},
    },
    "downsample_args": {"downsample_factor": 4},
}
"""An audio tower and its projector, as params.json describes them in `multimodal.whisper_model_args`."""


def save_wrapper(
    directory: Path,
    weights: Parameters,
    dtype: Any = np.float32,
    tower: Mapping[str, Any] | None = None,
    model: config.Model = TEXT,
) -> None:
    """Save the text model of `weights` in a wrapper; `tower` replaces or adds tensors of the tower and projector."""
    directory.mkdir()
    text = hf.write_model_config(model, dtype="float32", bos_token_id=1, eos_token_id=2)
    fields = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    fields |= {"vision_config": VISION, "tie_word_embeddings": False, "image_token_index": 5, "spatial_merge_size": 2}
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 8}, "patch_size": 2}))
    draw = np.random.default_rng(7).normal
    tensors = {name: draw(0, 0.2, shape).astype(dtype) for name, shape in TOWER.items()} | dict(tower or {})
    for piece in names.weight_pieces(model, names.wrapped_in_files(model)):
        tensors[piece.name] = np.ascontiguousarray(piece.to_file(np.asarray(weights[piece.path])[piece.lead]).astype(dtype))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def save_run_on_wrapper(directory: Path, tokenizer: HuggingFace, dtype: Any = np.float32) -> None:
    """`directory / "base"` and `directory / "run"`."""
    with jax.set_mesh(ONE):
        weights = random_parameters(TEXT, lora=LORA)
        save_wrapper(directory / "base", weights, dtype)
        sections = {"model": TEXT, "mesh": config.Mesh(), "loss": config.Loss(), "lora": LORA}
        runs.save_run(directory / "run", weights, tokenizer, init_from=str(directory / "base"), **sections)


def written_config(directory: Path, tokenizer: HuggingFace) -> config.Config:
    """The config of a run of adapters on `directory / "base"`."""
    (directory / "data.txt").write_text("some text\n")
    source = config.FileSource(name="files", files=(str(directory / "data.txt"),), record=config.TextRecord(name="text"))
    named = config.HuggingFaceTokenizer(name="huggingface", path=str(tokenizer.path))
    return config.Config(
        name="run",
        run_dir=str(directory / "new"),
        init_from=str(directory / "base"),
        lora=LORA,
        data=config.Data(tokenizer=named, train=(source,)),
        train=config.Train(steps=1, batch_size=1, seq_len=16),
        optimizer=config.AdamW(name="adamw", learning_rate=1e-3),
        loss=config.Loss(),
    )

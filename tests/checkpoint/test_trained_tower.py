"""What was trained of a tower is found through a chain of runs, adapters with the weights that they adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from moe_train import config
from moe_train.checkpoint.trained_tower import trained_tower_paths
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.weights import external
from tests.commands import runs
from tests.commands.wrapper import TEXT, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE


def test_paths_of_a_chain_of_runs(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        save_wrapper(tmp_path / "base", random_parameters(TEXT))
        encoder = external.read_encoder(tmp_path / "base", config.VisionEncoder)
        weights = random_parameters(TEXT, encoder=encoder)
        lora = config.Lora(targets=(config.LoraTarget(modules=("vision.projector.out_proj",), rank=2, alpha=3.0),))
        vision = config.Vision(patches_per_row=16, encoder=encoder)
        base = str(tmp_path / "base")

        def save(name: str, weights: Any, init_from: str, **more: Any) -> Path:
            sections = {"model": TEXT, "mesh": config.Mesh(), "loss": config.Loss(), "vision": vision} | more
            runs.save_run(tmp_path / name, weights, small_tokenizer, init_from=init_from, **sections)
            return tmp_path / name

        first = save("first", weights, base, vision=vision.model_copy(update={"train": ("vision.projector.in_proj",)}))
        blind = save("blind", random_parameters(TEXT), str(first), vision=None)
        frozen = save("frozen", weights, base)
        adapted = save("adapted", random_parameters(TEXT, lora=lora, encoder=encoder), base, lora=lora)
        trained = {name: trained_tower_paths(name) for name in (tmp_path / "base", first, blind, frozen, adapted)}
    assert trained[tmp_path / "base"] == trained[frozen] == (None, frozenset())
    assert trained[first] == trained[blind] == (encoder, {"vision.projector.in_proj.weight"})
    leaves = {path.removeprefix("vision.projector.out_proj.") for path in trained[adapted].paths}
    assert trained[adapted].encoder == encoder and leaves == {"weight", "lora_a", "lora_b"}

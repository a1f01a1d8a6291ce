"""A little text and its tokenizer, a small run's config, and one cache of compiled programs for all of these tests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.data.train_tokenizer import train_bpe


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Iterator[Path]:
    """The folder of compiled programs; many runs of one shape compile once."""
    folder = pytestconfig.cache.mkdir("jax")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield folder
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, eval.jsonl and tokenizer/."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ab", "can", "de", "for", "gen", "in") for b in ("le", "ter", "ion", "al", "s")]
    records = [" ".join(rng.choices(words, k=rng.randint(2, 30))) for _ in range(220)]
    for name, part in (("train", records[:200]), ("eval", records[200:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": record}) + "\n" for record in part))
    train_bpe(records, 280, folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def small_run(text: Path, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., config.Config]:
    """`small_run(run_dir, **changes)`: 6 steps of a dense model on 8 devices, a checkpoint every 2."""
    cache = tmp_path_factory.mktemp("tokens")

    def make(run_dir: Path, **changes: Any) -> config.Config:
        tree: dict[str, Any] = {
            "name": "small",
            "run_dir": str(run_dir),
            "model": {
                "family": "mistral",
                "vocab_size": 288,
                "model_dim": 32,
                "num_layers": 2,
                "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
                "ffn": {"name": "dense", "ffn_dim": 48},
                "max_seq_len": 64,
            },
            "data": {
                "tokenizer": {"name": "huggingface", "path": str(text / "tokenizer")},
                "train": [{"name": "files", "files": [str(text / "train.jsonl")], "record": {"name": "text"}}],
                "eval": [{"name": "files", "files": [str(text / "eval.jsonl")], "record": {"name": "text"}}],
                "cache_dir": str(cache),
            },
            "train": {"steps": 6, "batch_size": 8, "seq_len": 32},
            "optimizer": {"name": "adamw", "learning_rate": 1e-2},
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
            "evaluation": {"every_steps": 3},
            "checkpoint": {"every_steps": 2, "keep_last": 5},
            "metrics": {"tensorboard": False},
        }
        for dotted, value in changes.items():
            *sections, key = dotted.split("__")
            at = tree
            for section in sections:
                at = at[section]
            at[key] = value
        return config.Config.model_validate_json(json.dumps(tree))

    return make

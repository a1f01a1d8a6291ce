"""A process that exports, loads or extends a large random model, and says how much memory that took: `streaming.py MODE
FOLDER`.

MODE is `tensors` or `full` (the proof's depth), `load`, or `extend` (the vocabulary, to v3's). Prints JSON: MiB that were
resident at most above what was before, those of the model, those of its largest tensor, and those of the files.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.extend_vocab import extend_vocab
from moe_train.mesh import make_mesh
from moe_train.model.transformer import init_model, parameters
from moe_train.weights import expected, foreign, write

MODEL = config.Model(
    family="mixtral",
    vocab_size=32000,
    model_dim=1024,
    num_layers=11,
    max_seq_len=64,
    attention=config.Attention(num_heads=16, num_kv_heads=4, head_dim=64),
    ffn=config.MoeFfn(name="moe", ffn_dim=2816, num_experts=8, experts_per_token=2),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),))


def status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def above(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what `work` returns, MiB that were resident at most above those before)."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = status("VmRSS")
    result = work()
    return result, status("VmHWM") - before


def main(mode: str, folder: Path) -> dict[str, float]:
    with jax.set_mesh(make_mesh(config.Mesh())):
        lora = LORA if mode in ("tensors", "full") else None
        shapes = parameters(jax.eval_shape(lambda: init_model(0, MODEL, config.Compute(param_dtype="bfloat16"), lora)))[1]
        own = sum(x.size * x.dtype.itemsize for path, x in shapes.items() if ".lora_" not in path) / 2**20
        if mode == "load":
            _, most = above(lambda: foreign.load_parameters(folder / "tensors", shapes))
            most -= own
        elif mode == "extend":
            shutil.copy(str(resources.files("mistral_common") / "data" / "tokenizer.model.v1"), folder / "tensors")
            _, most = above(lambda: extend_vocab(folder / "tensors", folder / "extended", "v3"))
        else:
            rng, here = np.random.default_rng(0), jax.sharding.get_mesh()
            some = rng.normal(0, 0.02, 2**20).astype(ml_dtypes.bfloat16)
            weights = {
                path: jax.device_put(np.resize(some, x.shape).astype(x.dtype), NamedSharding(here, x.sharding.spec))
                for path, x in shapes.items()
            }
            jax.block_until_ready(weights)
            out = folder / mode
            _, most = above(lambda: write.export(weights, MODEL, out, dtype="bfloat16", lora=LORA, merge=True, depth=mode))  # type: ignore[arg-type]
    largest = max(np.prod(tensor.shape) * 2 for tensor in expected.model_tensors("hf", MODEL)) / 2**20
    files = sum(file.stat().st_size for file in (folder / "tensors").glob("*.safetensors")) / 2**20
    return {"above": most, "model": own, "largest": float(largest), "files": files}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))

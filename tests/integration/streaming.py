"""A process that exports, loads or extends a large random model, and says how much memory that took: `streaming.py MODE
FOLDER`.

MODE is `tensors` or `full` (the proof's depth), `files` (as `tensors`, the base left in the files that that one wrote), `fp8`
(as `tensors`, in that dtype), `load`, `load_fp8`, `extend` (the vocabulary, to v3's), or `run` (a checkpoint, into 4 bits).
Prints JSON: MiB that were resident at most above what was before and stays, those of the model, those of its largest tensor, and
those of the files.
"""

from __future__ import annotations

import gc
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
import optax
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.checkpoint import manager, model_dir
from moe_train.checkpoint.metadata import CheckpointMetadata
from moe_train.commands import write_and_prove
from moe_train.commands.extend_vocab import extend_vocab
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.proof import expected
from moe_train.train.state import create_state
from moe_train.weights import external
from moe_train.weights.arrays import Abstract

MODEL = config.Model(
    family="mixtral",
    vocab_size=32000,
    model_dim=1024,
    num_layers=11,
    max_seq_len=64,
    attention=config.GroupedQueryAttention(num_heads=16, num_kv_heads=4, head_dim=64),
    ffn=config.MoeFfn(name="moe", ffn_dim=2816, num_experts=8, experts_per_token=2),
)
COMPUTE = config.Compute(param_dtype="bfloat16")
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),))


def status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def above(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what `work` returns, MiB that were resident at most above those before)."""
    gc.collect()  # what is resident and not in use any more would hide as much of the work's
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = status("VmRSS")
    result = work()
    return result, status("VmHWM") - before


def shapes_of(lora: config.Lora | None) -> Abstract:
    return parameters(abstract_model(MODEL, COMPUTE, lora))[1]


def random_weights(shapes: Abstract) -> Parameters:
    some = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(ml_dtypes.bfloat16)
    here = jax.sharding.get_mesh()
    weights = {
        path: jax.device_put(np.resize(some, x.shape).astype(x.dtype), NamedSharding(here, x.sharding.spec))
        for path, x in shapes.items()
    }
    return jax.block_until_ready(weights)


def save_run(run_dir: Path) -> None:
    """A run in which nothing but a checkpoint is."""
    sections = {
        "model": MODEL,
        "compute": COMPUTE,
        "train": {"steps": 1, "batch_size": 1, "seq_len": 8},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "loss": {"load_balance_loss_coef": 0, "router_z_loss_coef": 0},
    }
    run = config.Config.model_validate({"name": "run", "run_dir": str(run_dir), **sections})
    state = create_state(random_weights(shapes_of(None)), optax.identity())
    with manager.open_for_saving(run_dir, run.checkpoint) as checkpoints:
        manager.save(checkpoints, 1, state, CheckpointMetadata(run.model_dump(mode="json"), 0, "", None))


def main(mode: str, folder: Path) -> dict[str, float]:
    with jax.set_mesh(make_mesh(config.Mesh())):
        shapes = shapes_of(LORA if mode in ("tensors", "full", "files", "fp8") else None)
        own = sum(x.size * x.dtype.itemsize for path, x in shapes.items() if ".lora_" not in path) / 2**20
        largest = max(np.prod(tensor.shape) * 2 for tensor in expected.model_tensors("hf", MODEL)) / 2**20
        if mode in ("load", "load_fp8"):
            source = "tensors" if mode == "load" else "fp8"
            _, most = above(lambda: external.load_external_parameters(folder / source, shapes))
            most -= own
        elif mode == "run":
            if not (folder / "run").exists():  # in a process of its own: what saving took is not to count
                save_run(folder / "run")
            largest = max(x.size * x.dtype.itemsize for x in shapes.values()) / 2**20  # a checkpoint's tensors are all layers'
            few_bits = shapes_of(LORA.model_copy(update={"quantize": config.Nf4(name="nf4")}))
            few_bits = {path: x for path, x in few_bits.items() if ".lora_" not in path}
            held, most = above(lambda: jax.block_until_ready(model_dir.load_parameters(folder / "run", few_bits)))
            most -= sum(x.nbytes for x in held.values()) / 2**20
        elif mode == "extend":
            shutil.copy(str(resources.files("mistral_common") / "data" / "tokenizer.model.v1"), folder / "tensors")
            _, most = above(lambda: extend_vocab(folder / "tensors", folder / "extended", "v3"))
        else:
            out, depth = folder / mode, "tensors" if mode in ("files", "fp8") else mode
            dtype = "fp8" if mode == "fp8" else "bfloat16"
            base = {path: x for path, x in shapes.items() if not ParameterPath.parse(path).is_adapter}
            left = external.open_external_lazily(folder / "tensors", base) if mode == "files" else {}
            weights = random_weights({path: x for path, x in shapes.items() if path not in left}) | left
            _, most = above(
                lambda: write_and_prove.export_model(
                    weights, MODEL, out, write_and_prove.WriteOptions(dtype=dtype, lora=LORA, merge=True, depth=depth)
                )
            )  # type: ignore[arg-type]
    files = sum(file.stat().st_size for file in (folder / "tensors").glob("*.safetensors")) / 2**20
    return {"above": most, "model": own, "largest": float(largest), "files": files}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))

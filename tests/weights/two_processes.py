"""One of several processes that export a model together: `two_processes.py OUT_DIR [full]`.

The environment says which one it is (`mesh.join_processes`); with `full` process 1 finds its disk full. Writes
OUT_DIR.PROCESS.json: bytes of tensors that this process read when it loaded what all have written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_train import config, mesh
from moe_train.model.transformer import init_model, parameters
from moe_train.weights import foreign, safetensors_io, write

MODEL = config.Model(
    family="mixtral",
    vocab_size=64,
    model_dim=32,
    num_layers=2,
    max_seq_len=64,
    attention=config.Attention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=48, num_experts=4, experts_per_token=2),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),))
MESH = config.Mesh(fsdp=2, expert=2, tensor=2)


def weights() -> dict[str, jax.Array]:
    """The same numbers on any mesh, on the one in force."""
    rng, here = np.random.default_rng(0), jax.sharding.get_mesh()
    found = {}
    for path, like in sorted(parameters(jax.eval_shape(lambda: init_model(0, MODEL, config.Compute(), LORA)))[1].items()):
        host = rng.normal(0, 0.2, like.shape).astype(like.dtype)
        found[path] = jax.make_array_from_callback(host.shape, NamedSharding(here, like.sharding.spec), host.__getitem__)
    return found


def export(out_dir: Path) -> None:
    write.export(weights(), MODEL, out_dir, dtype="bfloat16", lora=LORA, merge=True, max_shard_bytes=20_000)


def main(out_dir: Path, full: bool) -> None:
    mesh.join_processes()
    read, count = 0, safetensors_io.Tensor._read_into

    def counting(self: safetensors_io.Tensor, out: np.ndarray, offset: int) -> None:
        nonlocal read
        read += out.nbytes
        count(self, out, offset)

    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    if full and jax.process_index() == 1:
        safetensors_io.write_file = no_space
    with jax.set_mesh(mesh.make_mesh(MESH)):
        export(out_dir)
        safetensors_io.Tensor._read_into = counting  # type: ignore[method-assign]
        shapes = parameters(jax.eval_shape(lambda: init_model(0, MODEL, config.Compute(param_dtype="bfloat16"))))[1]
        foreign.load_parameters(out_dir, shapes)
    Path(f"{out_dir}.{jax.process_index()}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    assert "JAX_COORDINATOR_ADDRESS" in os.environ
    main(Path(sys.argv[1]), sys.argv[2:] == ["full"])

"""Files beside transformers': seconds and memory to save and to load a Mixtral of 995 MiB in float32, a process each.

    python tests/benchmarks/files.py [--cores 1] [--rounds 3] [--modes save write tensors full load]

Saving is until the directory has its name: ours is synced to the disk, transformers' is not. `write` is without the proof;
`tensors` and `full` are with it. Loading touches every number. Memory is the most that was resident above the model's own
(for loading: above the interpreter's, less the model), from /proc/self/status, in MiB; warm cache, and memory that was
touched once before. Rounds go there and back again; figures, and ratios to transformers in the same round, are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SIZES = {"vocab": 32000, "hidden": 512, "intermediate": 1792, "layers": 10, "heads": 8, "kv_heads": 4, "head_dim": 64, "experts": 8}


def status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def measure(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    bytearray(3 * 2**29)[:: 2**12] = b"1" * (3 * 2**17)  # a virtual machine's host hands out memory at its first touch
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, start, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    result = work()
    seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "cpu": time.process_time() - cpu, "above": status("VmHWM") - before}


def ours(mode: str, folder: Path) -> dict[str, float]:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from moe_train import config
    from moe_train.commands import write_and_prove
    from moe_train.machine.files import new_directory
    from moe_train.machine.mesh import make_mesh
    from moe_train.model.parameters import parameters
    from moe_train.model.transformer import abstract_model
    from moe_train.weights import external, merge

    s = SIZES
    model = config.Model(
        family="mixtral",
        vocab_size=s["vocab"],
        model_dim=s["hidden"],
        num_layers=s["layers"],
        attention=config.GroupedQueryAttention(num_heads=s["heads"], num_kv_heads=s["kv_heads"], head_dim=s["head_dim"]),
        ffn=config.MoeFfn(name="moe", ffn_dim=s["intermediate"], num_experts=s["experts"], experts_per_token=2),
    )
    with jax.set_mesh(make_mesh(config.Mesh())):
        shapes = parameters(abstract_model(model, config.Compute()))[1]
        if mode == "load":
            loaded, figures = measure(lambda: external.load_external_parameters(folder / "hf", shapes))
            sums, more = measure(lambda: sum(float(np.asarray(x).sum()) for x in loaded.values()))
            own = sum(x.nbytes for x in loaded.values()) / 2**20
            return {key: figures[key] + more[key] for key in ("seconds", "cpu")} | {"above": figures["above"] - own, "sum": sums}
        rng, sharding = np.random.default_rng(0), jax.sharding.get_mesh()
        weights = {
            path: jax.device_put(rng.random(x.shape, np.float32) - 0.5, NamedSharding(sharding, x.sharding.spec))
            for path, x in shapes.items()
        }
        jax.block_until_ready(weights)

        def plain() -> None:
            def matrix(piece: Any, dtype: np.dtype) -> np.ndarray:
                return piece.to_file(merge.merged(weights, None, piece, dtype))

            with new_directory(folder / "hf") as directory:
                write_and_prove.write_model(directory, model, matrix, write_and_prove.WriteOptions(dtype="float32"))

        if mode == "write":
            return measure(plain)[1]
        return measure(
            lambda: write_and_prove.export_model(
                weights, model, folder / "hf", write_and_prove.WriteOptions(dtype="float32", depth=mode)
            )
        )[1]  # type: ignore[arg-type]


def theirs(mode: str, folder: Path) -> dict[str, float]:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    if mode == "load":

        def load() -> Any:
            model = MixtralForCausalLM.from_pretrained(folder / "theirs", dtype=torch.float32)
            return sum(p.sum().item() for p in model.parameters()), sum(p.nbytes for p in model.parameters())

        (_, own), figures = measure(load)
        return {**figures, "above": figures["above"] - own / 2**20}
    s = SIZES
    settings = MixtralConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["intermediate"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=s["head_dim"],
        num_local_experts=s["experts"],
        num_experts_per_tok=2,
        sliding_window=None,
    )
    model = MixtralForCausalLM(settings)
    return measure(lambda: model.save_pretrained(folder / "theirs"))[1]


def one(whose: str, mode: str, folder: Path, cores: int) -> dict[str, float]:
    """A measurement in a process of its own."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(cores), "PYTHONPATH": str(ROOT)}
    command = ["taskset", "-c", ",".join(map(str, range(cores))), sys.executable, __file__, whose, mode, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


SAVES = [("theirs", "save"), ("ours", "write"), ("ours", "tensors"), ("ours", "full")]
LOADS = [("theirs", "load"), ("ours", "load")]


def main(cores: int, rounds: int, modes: list[str]) -> None:
    kept: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in SAVES + LOADS if pair[1] in modes}
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
            turn = list(kept)[:: 1 if number % 2 == 0 else -1]
            for whose, mode in sorted(turn, key=lambda pair: pair[1] == "load"):
                folder = Path(scratch) / (whose if mode == "load" else mode)
                folder.mkdir(exist_ok=True)
                kept[whose, mode].append(one(whose, mode, folder, cores))
                if mode in ("save", "write"):  # what is loaded then
                    folder.rename(folder.with_name(whose))
                else:
                    shutil.rmtree(folder)
            print(f"round {number + 1}", {" ".join(pair): round(runs[-1]["seconds"], 2) for pair, runs in kept.items()}, flush=True)
    for (whose, mode), runs in kept.items():
        base = kept["theirs", "load" if mode == "load" else "save"]
        seconds, cpu, above = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "above"))
        ratios = [
            f"{statistics.median(b[key] / run[key] for b, run in zip(base, runs, strict=True)):5.2f}x" for key in ("seconds", "cpu")
        ]
        print(f"{whose:7} {mode:8} {seconds:6.2f} s {cpu:6.2f} CPU s {above:7.0f} MiB  {' '.join(ratios)}")


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1] in ("ours", "theirs"):
        print(json.dumps({"ours": ours, "theirs": theirs}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--cores", type=int, default=1)
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--modes", nargs="+", default=["save", "write", "tensors", "full", "load"])
        args = parser.parse_args()
        main(args.cores, args.rounds, [*args.modes, *(("save", "write") if "load" in args.modes else ("save",))])

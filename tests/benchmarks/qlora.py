"""A real model's frozen weights in few bits: the same LoRA run beside float32, bfloat16, int8 and nf4, a process each.

    taskset -c 0 python tests/benchmarks/qlora.py SMOLLM2_GGUF GSM8K_TRAIN [--experts 4] [--steps 30] [--batch 2]

The run is configs/smollm2_upcycle_lora.yaml: SmolLM2-135M-Instruct, its FFN copied into experts, LoRA beside attention and
experts, on GSM8K; the same batches in each. Arithmetic is in float32; scales of weights in few bits, and what stays whole
beside these, are bfloat16. `before` and `after` are held-out losses; `weights` is what the frozen ones take, `peak` the
process at its largest. A run of the size given takes one core about 5 minutes; 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs/smollm2_upcycle_lora.yaml"
KINDS = {
    "float32": (),
    "bfloat16": ("compute.param_dtype=bfloat16",),
    "int8": ("compute.param_dtype=bfloat16", "lora.quantize={name: int8}"),
    "nf4": ("compute.param_dtype=bfloat16", "lora.quantize={name: nf4}"),
}
HELD_OUT = 73


def moe_train(*arguments: str | Path) -> tuple[str, float]:
    """What a command prints, and the MiB of its process at its largest."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [sys.executable, "-m", "moe_train", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return said, usage.ru_maxrss / 1024


def measure(folder: Path, kind: str, changes: list[str]) -> dict[str, Any]:
    changes = [*changes, f"run_dir={folder / kind}", *KINDS[kind]]
    rows = json.loads(moe_train("inspect", RECIPE, *changes, "--json")[0])["parameters"]
    peak = moe_train("train", RECIPE, *changes)[1]
    lines = list(map(json.loads, (folder / kind / "metrics.jsonl").read_text().splitlines()))
    before, *_, after = (line["loss"] for line in lines if line["kind"] == "eval")
    return {
        **{"frozen": kind, "before": before, "after": after},
        "weights": sum(row["bytes_per_device"] for row in rows if not row["trainable"]) / 2**20,
        "peak": peak,
        "seconds_per_step": statistics.median([line["seconds"] for line in lines if line["kind"] == "train"][2:]),
    }


def main(gguf: Path, gsm8k: Path, experts: int, steps: int, batch: int, scratch: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        moe_train("upcycle", gguf, folder / "moe", "--experts", str(experts), "--json")
        lines = gsm8k.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
        (folder / "eval.jsonl").write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
        changes = [f"data.{part}.0.files=[{folder / part}.jsonl]" for part in ("train", "eval")]
        changes += [f"init_from={folder / 'moe'}", f"data.cache_dir={folder / 'cache'}", f"train.steps={steps}"]
        changes += [f"train.batch_size={batch}", f"evaluation={{every_steps: {steps}, batches: 16, drift_batches: 0}}"]
        for kind in KINDS:
            found = measure(folder, kind, changes)
            print(
                "{frozen:9} before {before:.4f}  after {after:.4f}  weights {weights:6.0f} MiB  peak {peak:6.0f} MiB  "
                "{seconds_per_step:5.2f} s a step".format(**found),
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    main(**vars(arguments))

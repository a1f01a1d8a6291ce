"""A gate on a real model: SmolLM2-135M before and after a short LoRA on two-operand arithmetic, and a planted regression.

    taskset -c 0 python tests/benchmarks/arithmetic_gate.py SMOLLM2_GGUF [--steps 12] [--items 100] [--gsm8k FOLDER]

Problems such as `What is 47 + 8?` are answered as in GSM8K (`47 + 8 = 55` and `#### 55`). A hash of each problem decides whether it
is trained on or asked. The fine-tuned model has to pass `--require 'arithmetic >= base'`; the base in its place, a regression, has
to fail it with exit code 3; and the merged export has to give the fine-tuned run's answers, item by item (`verify --suite`).
With the folder of GSM8K's train.jsonl, the two models' scores on 50 of its problems stand beside them. Takes 15 minutes of one
core, and the problems of GSM8K as long again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "name": "arithmetic",
    "lora": {"targets": [{"modules": ["attention.*", "ffn.*"], "rank": 16, "alpha": 32}]},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": {"name": "linear", "warmup_steps": 4}},
}
SUITE = {
    "name": "arithmetic",
    "items": "held_out.jsonl",
    "generation": {"max_tokens": 24},
    "grader": {"name": "number", "after": "####"},
    "batch_size": 32,
}


def moe_train(*arguments: str | Path, expected: int = 0) -> str:
    """What a command prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [sys.executable, "-m", "moe_train", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != expected:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}, not {expected}")
    return done.stdout


def write_problems(folder: Path, items: int) -> None:
    """Write problems to train on and `items` to ask, divided by a hash of the problem alone."""
    train: list[str] = []
    held_out: list[str] = []
    for first in range(2, 100):
        for second in range(2, 100):
            question = f"What is {first} + {second}?"
            line = json.dumps({"question": question, "answer": f"{first} + {second} = {first + second}\n#### {first + second}"})
            digest = int(hashlib.sha256(question.encode()).hexdigest(), 16)
            (held_out if digest % 10 == 0 else train).append(line)
    # In the order of their hashes, so that the first ones are a sample of all.
    for name, lines in (("train", train), ("held_out", held_out)):
        lines.sort(key=lambda line: hashlib.sha256(line.encode()).hexdigest())
        kept = lines if name == "train" else lines[:items]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def write_config(folder: Path, gguf: Path, steps: int) -> Path:
    """Write the config of the LoRA run."""
    record = {"name": "completion", "prompt": "question", "completion": "answer"}
    sections = {
        "run_dir": str(folder / "run"),
        "init_from": str(gguf),
        "data": {
            "train": [{"name": "files", "files": [str(folder / "train.jsonl")], "record": record}],
            "cache_dir": str(folder / "cache"),
        },
        "train": {"steps": steps, "batch_size": 8, "seq_len": 64},
        "checkpoint": {"every_steps": steps},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps({**CONFIG, **sections}), encoding="utf-8")
    return path


def show(result: dict[str, Any]) -> None:
    """Print the scores and comparisons of a result."""
    for score in result["suites"]:
        print("{suite}: {model} {score:.3f} [{low:.3f}, {high:.3f}]".format(**score), flush=True)
    for row in result["comparisons"]:
        print("{suite}: {difference:+.3f} [{low:+.3f}, {high:+.3f}] against {against}: {verdict}".format(**row), flush=True)


def main(gguf: Path, steps: int, items: int, gsm8k: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_problems(folder, items)
        (folder / "suite.yaml").write_text(json.dumps(SUITE), encoding="utf-8")
        moe_train("train", write_config(folder, gguf, steps))
        tuned, suite = folder / "run", ("--suite", folder / "suite.yaml", "--json")
        gate = ("--require", "arithmetic >= base")
        show(json.loads(moe_train("evaluate", tuned, *suite, "--against", gguf, *gate, "--out", folder / "result")))
        planted = json.loads(moe_train("evaluate", gguf, *suite, "--against", tuned, *gate, expected=3))
        print(f"planted regression: caught, lower bound {planted['requirements'][0]['lower_bound']:+.3f}", flush=True)
        moe_train("export", tuned, folder / "merged", "--merge", "--dtype", "float32", "--json")
        checks = json.loads(moe_train("verify", folder / "merged", "--proof", "tensors", "--suite", folder / "result", "--json"))
        print(next(check["said"] for check in checks["checks"] if check["name"].startswith("answers")), flush=True)
        if gsm8k is not None:
            overrides = ("items=train.jsonl", "limit=50", "prompt={chat: true}")
            reported = ("--suite", ROOT / "configs/suites/gsm8k.yaml", "--suite-data", gsm8k, "--json")
            show(json.loads(moe_train("evaluate", tuned, *overrides, *reported, "--against", gguf)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--gsm8k", type=Path)
    main(**vars(parser.parse_args()))

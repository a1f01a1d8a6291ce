"""The commands around config files: recipes, explain, convert and schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_train.cli.arguments import START, AsJson, help_examples
from moe_train.cli.terminal import print_json, print_mapping, print_table
from moe_train.machine.program import runnable

config_commands = typer.Typer()
Kind = Literal["config", "suite"]


@config_commands.command(
    "recipes",
    rich_help_panel=START,
    epilog=help_examples(
        "moe-train recipes",
        "moe-train recipes mixtral_8x7b_lora_h100x8 --copy run.yaml",
    ),
)
def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Recipe to show. Default: list all.")] = None,
    copy: Annotated[Path | None, typer.Option("--copy", metavar="OUT", help="Write the recipe to this new file.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that come with the package, show one, or copy one to change it."""
    from moe_train.commands.recipes import copy_recipe, recipe, recipes

    if copy is not None:
        if name is None:
            raise typer.BadParameter("--copy needs the NAME of a recipe")
        for file in copy_recipe(name, copy):
            print(file)
    elif name is not None:
        shown = recipe(name)
        if as_json:
            print_json(shown._asdict())
        else:
            print(runnable(shown.text), end="")
    else:
        rows = [{"recipe": r.name, "hardware": r.facts["Hardware"], "purpose": r.purpose} for r in recipes()]
        if as_json:
            print_json(rows)
        else:
            print_table(rows)


@config_commands.command(
    "explain",
    rich_help_panel=START,
    epilog=help_examples("moe-train explain optimizer.rounding", "moe-train explain lora"),
)
def explain_command(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="Key such as optimizer.rounding. Default: list all.")] = None,
    kind: Annotated[Kind, typer.Option(help="Kind of file that the key belongs to.")] = "config",
    as_json: AsJson = False,
) -> None:
    """Explain a key of a config: its type, default, meaning, and the recipes that state it."""
    from moe_train.commands.explain import explain_key, list_keys

    if key is None:
        rows = list_keys(kind)
        if as_json:
            print_json(rows)
        else:
            print_table(rows)
        return
    meanings = explain_key(key, kind)
    if as_json:
        print_json(meanings)
        return
    for i, meaning in enumerate(meanings):
        if i:
            print()
        print_mapping(meaning)
    below = list_keys(kind, meanings[0]["key"])
    if below:
        print()
        print_table(below)


@config_commands.command(
    "convert",
    rich_help_panel=START,
    epilog=help_examples("moe-train convert axolotl.yaml run.yaml", "moe-train convert sft_args.yaml run.yaml --trainer trl"),
)
def convert_command(
    theirs: Annotated[
        Path, typer.Argument(metavar="THEIRS", help="YAML config of axolotl, LLaMA-Factory, mistral-finetune or TRL.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Config to write; it must not exist yet.")],
    trainer: Annotated[
        Literal["axolotl", "llama-factory", "mistral-finetune", "trl"] | None,
        typer.Option(help="The trainer that THEIRS is for. Default: recognized by its keys."),
    ] = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Number of devices that THEIRS ran on, which its batch size per device is multiplied by.")
    ] = 1,
) -> None:
    """Convert another trainer's config: what has an equivalent is written, the rest becomes comments with the reason."""
    from moe_train.commands.convert import convert_config

    conversion = convert_config(theirs, out, trainer, devices)
    print(f"{out}: {conversion.settings_written} settings of {conversion.trainer} written, {len(conversion.remarks)} remarks")
    for remark in conversion.remarks:
        print(f"  {runnable(remark)}")


@config_commands.command(
    "schema",
    rich_help_panel=START,
    epilog=help_examples("moe-train schema > schema.json", "moe-train schema suite > suite_schema.json"),
)
def schema_command(
    kind: Annotated[Kind, typer.Argument(help="The kind of file: a run's config, or a suite.")] = "config",
) -> None:
    """Print the JSON schema of a kind of file, from which editors complete and check keys."""
    from moe_train import config
    from moe_train.config.schema import json_schema

    print_json(json_schema(config.Suite if kind == "suite" else config.Config))

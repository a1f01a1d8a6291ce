"""The commands `moe-train adapters …`: compare, merge and scale adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_train.cli.arguments import AsJson, OutDir
from moe_train.cli.terminal import console, print_answers, print_checks, print_json, waiting

app = typer.Typer(name="adapters", help="Compare, merge and scale adapters.", no_args_is_help=True)

AdapterDir = Annotated[Path, typer.Argument(metavar="ADAPTER", help="A run with adapters, a PEFT adapter, or Mistral's own.")]


@app.command("diff")
def diff_adapters(
    adapter: AdapterDir,
    base: Annotated[Path | None, typer.Option(help="The base model, where the adapter names none that is here.")] = None,
    against: Annotated[Path | None, typer.Option(metavar="ADAPTER", help="Compare with these adapters of the same base.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Matrices to name; --json has all.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show how far each module, layer and expert moved: the norm of its change over the norm of its weight."""
    from moe_train.commands.adapters import diff, show

    with waiting("comparing"):
        found = diff(adapter, base, against)
    if as_json:
        moved = [{**m._asdict(), "relative": m.relative if m.weight else None} for m in found.moved]
        print_json({"base": found.base, "moved": moved, "experts": found.experts()})
        return
    for part in show(found, top):
        console().print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


@app.command("merge")
def merge_adapter(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model that the adapter belongs to.")],
    adapter: AdapterDir,
    out_dir: OutDir,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Of the files; else that of the base's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write BASE with the adapter added, as a Hugging Face model, proved."""
    from moe_train.commands.adapters import merge_into

    with waiting("merging"):
        record = merge_into(base, adapter, out_dir, dtype)
    if as_json:
        print_json({"directory": str(out_dir), "checks": record["checks"]})
    else:
        print_checks(record["checks"])


@app.command("scale")
def scale_adapter(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A PEFT adapter.")],
    factor: Annotated[float, typer.Argument(metavar="FACTOR", help="What its deltas are multiplied with.")],
    out_dir: OutDir,
    as_json: AsJson = False,
) -> None:
    """Write a PEFT adapter that does FACTOR as much; every tensor keeps its bytes."""
    from moe_train.commands.adapters import scale

    print_answers(scale(adapter, factor, out_dir), as_json)

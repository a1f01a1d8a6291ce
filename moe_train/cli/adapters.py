"""The commands `moe-train adapters …`: compare, merge and scale adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_train.cli.arguments import AsJson, OutDir, Step, TextOnly, help_examples
from moe_train.cli.terminal import print_checks, print_json, print_mapping, progress_line, stdout_console

adapter_commands = typer.Typer(name="adapters", help="Compare, merge and scale adapters.", no_args_is_help=True)

AdapterDir = Annotated[
    Path,
    typer.Argument(metavar="ADAPTER", help="Directory of a run with adapters, or of an adapter in PEFT, Mistral or GGUF format."),
]


@adapter_commands.command(
    "diff",
    epilog=help_examples(
        "moe-train adapters diff runs/quickstart/lora",
        "moe-train adapters diff runs/quickstart/export_peft --base runs/quickstart/pretrain --top 5",
    ),
)
def diff_command(
    adapter: AdapterDir,
    base: Annotated[Path | None, typer.Option(help="Base model. Default: the one that the run or adapter names.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="ADAPTER", help="Other adapters of the same base, to compare with instead of with the base."),
    ] = None,
    step: Step = None,
    top: Annotated[int, typer.Option(min=1, help="Number of matrices to list, largest change first; --json lists all.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show how much training changed each module, layer and expert.

    The change of a matrix is the norm of its difference from the base, relative to the norm of the base's matrix.
    """
    from moe_train.commands.at_step import at_step
    from moe_train.commands.compare_adapters import comparison_tables, diff
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache()
    with progress_line("comparing"):
        comparison = diff(at_step(adapter, step), base, against)
    if as_json:
        print_json(comparison.to_json())
        return
    for title_or_table in comparison_tables(comparison, top):
        # A title may contain a path, which must be neither broken nor read as markup.
        stdout_console().print(title_or_table, markup=False, highlight=False, soft_wrap=isinstance(title_or_table, str))


@adapter_commands.command(
    "merge",
    epilog=help_examples("moe-train adapters merge runs/quickstart/pretrain runs/quickstart/export_peft model_with_adapter"),
)
def merge_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Directory of the model that the adapter belongs to.")],
    adapter: AdapterDir,
    out_dir: OutDir,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "fp8"] | None,
        typer.Option(help="Dtype of the written weights. Default: that of the base's files, dequantized."),
    ] = None,
    text_only: TextOnly = False,
    step: Step = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base model, write the result in Hugging Face format, and verify it."""
    from moe_train.commands.adapters import merge_into
    from moe_train.commands.at_step import at_step
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache()
    with progress_line("merging"):
        record = merge_into(base, at_step(adapter, step), out_dir, dtype, text_only)
    if as_json:
        print_json({"directory": str(out_dir), "checks": record["checks"]})
    else:
        print_checks(record["checks"])


@adapter_commands.command(
    "scale",
    epilog=help_examples("moe-train adapters scale runs/quickstart/export_peft 0.5 half_strength_adapter"),
)
def scale_command(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of a PEFT adapter.")],
    factor: Annotated[float, typer.Argument(metavar="FACTOR", help="Positive number by which the adapter's update is multiplied.")],
    out_dir: OutDir,
    as_json: AsJson = False,
) -> None:
    """Write a PEFT adapter whose update is FACTOR times as large.

    Only the alphas in its config change; the tensors are copied byte for byte.
    """
    from moe_train.commands.adapters import scale

    print_mapping(scale(adapter, factor, out_dir), as_json)

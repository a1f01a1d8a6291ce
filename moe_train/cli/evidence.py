"""The command `moe-train evidence`: documents and hashes for an auditor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_train.cli.arguments import MODELS, AsJson, help_examples
from moe_train.cli.data_options import refuse_options
from moe_train.cli.terminal import print_checks, print_json, print_mapping, progress_line

evidence_commands = typer.Typer()


@evidence_commands.command(
    "evidence",
    rich_help_panel=MODELS,
    epilog=help_examples(
        "moe-train evidence runs/quickstart/lora evidence_of_lora",
        "moe-train evidence runs/quickstart/export_hf evidence_of_export --power 700 --base-flops 1e22",
        "moe-train evidence --check evidence_of_lora",
    ),
)
def evidence_command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_EXPORT", help="Run (RUN or RUN@STEP) or export; the evidence with --check or --seal.")
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Directory to create; it must be empty or not exist yet.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check that evidence is as it was sealed, and that the files it speaks of are, too.")
    ] = False,
    seal: Annotated[bool, typer.Option("--seal", help="Seal evidence again, after its pages were filled in.")] = False,
    key: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Private key to sign with; with --check the public key that must have signed."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run of an export, if it is not where the export's record says.")] = None,
    base_flops: Annotated[
        float | None, typer.Option(min=1.0, metavar="FLOP", help="Training compute of the external base, from its documentation.")
    ] = None,
    power: Annotated[
        float | None, typer.Option(min=0.001, metavar="WATTS", help="Mean power of one device during the training, as measured.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a directory of evidence about a run or an export: documents for authorities, hashes, commands and records.

    The pages are a summary of the training content (Article 53(1)(d) of the EU AI Act), the model documentation form
    (Annexes XI and XII), and compute and energy. What no record has stands there as TODO.
    Exit code of --check: 1 if a file has changed.
    """
    from moe_train.commands import evidence

    if check or seal:
        action = "--check" if check else "--seal"
        stated = {"--run": run is not None, "--base-flops": base_flops is not None, "--power": power is not None}
        refuse_options({**stated, "OUT": out is not None, "--seal": check and seal}, f"{action} reads evidence that was written")
    if check:
        with progress_line("checking"):
            results = evidence.check_evidence(source, key)
        checks = [result.to_json() for result in results]
        # None is a check that cannot be made here, which is no failure.
        failed = [result.name for result in results if result.passed is False]
        if as_json:
            print_json({"directory": str(source), "passed": not failed, "checks": checks})
        else:
            print_checks(checks)
        if failed:
            print(f"moe-train: {source} no longer matches the files; these checks failed: {', '.join(failed)}", file=sys.stderr)
            raise typer.Exit(1)
        return
    if seal:
        print_mapping(evidence.seal_evidence(source, key), as_json)
        return
    if out is None:
        raise typer.BadParameter("state OUT, the directory to create")
    with progress_line("writing evidence"):
        answer = evidence.write_evidence(source, out, run, evidence.StatedFigures(base_flops, power), key)
    print_mapping(answer, as_json)

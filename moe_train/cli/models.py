"""The commands that read or write whole models: evaluate, export, verify, upcycle and extend-vocab."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_train.cli.arguments import AsJson, ChatTemplate, ModelDir, OutDir, ProofDepth, TextOnly, help_examples
from moe_train.cli.terminal import print_checks, print_json, print_mapping, print_table, progress_line

model_commands = typer.Typer()


@model_commands.command(
    "evaluate",
    epilog=help_examples(
        "moe-train evaluate runs/quickstart/lora --data runs/quickstart/text/chat_heldout.jsonl",
        "moe-train evaluate runs/tuned --suite kpi.yaml --against base_model --require 'kpi >= base - 0.02'",
    ),
)
def evaluate_command(
    directory: ModelDir,
    data: Annotated[list[Path] | None, typer.Option("--data", help="File of records; may be repeated.")] = None,
    suite: Annotated[list[Path] | None, typer.Option("--suite", help="YAML file of a suite; may be repeated.")] = None,
    against: Annotated[
        list[Path] | None, typer.Option("--against", help="Run or model to compare with, item by item; may be repeated.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option("--require", help="Requirement such as 'kpi >= base - 0.02'; exit code 3 if one is not met."),
    ] = None,
    items: Annotated[Path | None, typer.Option("--items", help="New file for the answers and scores of all items.")] = None,
    chat_template: ChatTemplate = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss of a run or a model on files (--data), or grade its answers to questions (--suite)."""
    from moe_train.commands.evaluate import evaluate_model
    from moe_train.commands.evaluate_suite import Comparisons, evaluate_suites
    from moe_train.machine.compile_cache import use_compile_cache

    if bool(data) == bool(suite):
        raise typer.BadParameter("state --data FILE for the loss on files, or --suite FILE.yaml for graded answers")
    if data and (against or require or items):
        raise typer.BadParameter("--against, --require and --items compare answers; state --suite FILE.yaml instead of --data")
    use_compile_cache()
    if data:
        with progress_line("evaluating"):
            answer = evaluate_model(directory, data, chat_template)
        print_mapping(answer, as_json)
        return
    with progress_line("evaluating"):
        result = evaluate_suites(directory, suite or [], Comparisons(against or (), require or ()), chat_template, items)
    if as_json:
        print_json(result)
    else:
        for part in ("suites", "comparisons", "requirements"):
            print_table(result[part])
    if not result["passed"]:
        raise typer.Exit(3)


@model_commands.command(
    "export",
    epilog=help_examples(
        "moe-train export runs/quickstart/lora merged_model --merge",
        "moe-train export runs/quickstart/lora model_gguf --merge --for llama.cpp --dtype bfloat16",
    ),
)
def export_command(
    source: ModelDir,
    out_dir: OutDir,
    layout: Annotated[
        Literal["hf", "mistral", "gguf", "peft", "mistral-lora", "gguf-lora"] | None,
        typer.Option(
            "--format",
            help="A whole model (hf, mistral, gguf) or only its adapter (peft, mistral-lora, gguf-lora). "
            "Default: hf, or gguf for llama.cpp and ollama.",
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapters into the weights.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the written weights: float32, bfloat16, float16, or fp8 (linear maps alone); for gguf also q8_0 and "
            "llama.cpp's other types, but not fp8. Default: that of the files that training started from, dequantized."
        ),
    ] = None,
    server: Annotated[
        Literal["vllm", "llama.cpp", "ollama", "transformers"] | None,
        typer.Option("--for", help="Write files that this server can read, and print the command that starts it."),
    ] = None,
    depth: ProofDepth = "full",
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum size of one file of weights, such as 5GB or 500MiB.")
    ] = None,
    text_only: TextOnly = False,
    as_json: AsJson = False,
) -> None:
    """Write a run or a model as files that other tools load, and verify them.

    OUT_DIR appears complete or not at all. The results of the verification are in its export_proof.json.
    """
    from moe_train.commands.export import ExportOptions, export
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache()
    layout = layout or ("gguf" if server in ("llama.cpp", "ollama") else "hf")
    options = ExportOptions(dtype=dtype, depth=depth, server=server, max_shard_size=max_shard_size, text_only=text_only)
    with progress_line("exporting"):
        record = export(source, out_dir, layout, merge, options)
    serve_command = record.get("serve")
    if as_json:
        result = {"directory": str(out_dir), "checks": record["checks"]}
        if serve_command:
            result["serve"] = serve_command
        print_json(result)
        return
    print_checks(record["checks"])
    if serve_command:
        print(f"start the server: {serve_command}")


@model_commands.command(
    "verify",
    epilog=help_examples(
        "moe-train verify runs/quickstart/export_hf",
        "moe-train verify runs/quickstart/export_hf --run runs/quickstart/lora --proof tensors",
    ),
)
def verify_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that `moe-train export` wrote.")],
    base: Annotated[
        Path | None, typer.Option(help="Model that training started from; checks that the files are a merge into it.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="With --base: the adapter that was merged; merges it again and compares every tensor.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run that was exported; compares every tensor with its weights.")] = None,
    depth: ProofDepth = "full",
    as_json: AsJson = False,
) -> None:
    """Repeat the verification of an export, as far as possible on this machine.

    Exit code 1 if the files are no longer what was exported.
    """
    from moe_train.commands.verify import verify
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache()
    with progress_line("verifying"):
        _, results = verify(directory, base, run, depth, adapter)
    checks = [check.to_json() for check in results]
    # None is a check that this machine cannot make, which is no failure.
    failed = [check.name for check in results if check.passed is False]
    if as_json:
        print_json({"directory": str(directory), "passed": not failed, "checks": checks})
    else:
        print_checks(checks)
    if failed:
        print(f"moe-train: {directory} is not what was exported; these checks failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


@model_commands.command(
    "upcycle",
    epilog=help_examples(
        "moe-train upcycle models/SmolLM2-135M-Instruct.Q4_1.gguf models/SmolLM2-4x135M --experts 4",
        "moe-train upcycle SmolLM2-135M-Instruct.Q4_1.gguf models/SmolLM2-fine --experts 64 --experts-per-token 8 --granularity 8",
    ),
)
def upcycle_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Dense model in Hugging Face, Mistral or GGUF format.")],
    out_dir: OutDir,
    experts: Annotated[int, typer.Option(min=2, help="Number of experts per layer, copies of the feed-forward layer.")] = 8,
    experts_per_token: Annotated[int, typer.Option(min=1, help="Number of experts that each token is routed to.")] = 2,
    granularity: Annotated[
        int, typer.Option(min=1, help="Number of fine-grained experts that each copy is split into; 1 keeps copies whole.")
    ] = 1,
    noise: Annotated[
        float,
        typer.Option(min=0.0, help="Standard deviation of noise added to the copies, relative to that of each matrix."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the routers and the noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Turn a dense model into a Mixtral: copy its feed-forward layers into experts, with new routers."""
    from moe_train.commands.upcycle import NewExperts, upcycle
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache()
    with progress_line("copying experts"):
        answer = upcycle(base, out_dir, NewExperts(experts, experts_per_token, granularity, noise, seed))
    print_mapping(answer, as_json)


@model_commands.command(
    "extend-vocab",
    epilog=help_examples("moe-train extend-vocab models/Mixtral-8x7B-v0.1 models/Mixtral-8x7B-v3 --tokenizer v3"),
)
def extend_vocab_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Model in Hugging Face, Mistral or GGUF format.")],
    out_dir: OutDir,
    tokenizer: Annotated[
        str, typer.Option(help="Version of Mistral's sentencepiece tokenizer (such as v3), or a tokenizer's file or directory.")
    ],
    layout: Annotated[Literal["hf", "mistral"], typer.Option("--format", help="Format of the written model.")] = "hf",
    as_json: AsJson = False,
) -> None:
    """Extend a model to a larger tokenizer, such as from 32000 tokens to the 32768 of v3, which tool calls need."""
    from moe_train.commands.extend_vocab import extend_vocab
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache()
    with progress_line("writing the model"):
        answer = extend_vocab(base, out_dir, tokenizer, layout)
    print_mapping(answer, as_json)

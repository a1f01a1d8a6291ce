"""The commands that read or write whole models: export, verify, upcycle and extend-vocab."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_train.cli.arguments import MODELS, AsJson, ModelDir, OutDir, ProofDepth, Step, TextOnly, help_examples
from moe_train.cli.terminal import print_checks, print_json, print_mapping, progress_line
from moe_train.machine.program import runnable

model_commands = typer.Typer()


@model_commands.command(
    "export",
    rich_help_panel=MODELS,
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
    step: Step = None,
    as_json: AsJson = False,
) -> None:
    """Write a run or a model as files that other tools load, and verify them.

    OUT_DIR appears complete or not at all. The results of the verification are in its export_proof.json.
    """
    from moe_train.commands.at_step import at_step
    from moe_train.commands.export import ExportOptions, export
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache()
    layout = layout or ("gguf" if server in ("llama.cpp", "ollama") else "hf")
    options = ExportOptions(dtype=dtype, depth=depth, server=server, max_shard_size=max_shard_size, text_only=text_only)
    with progress_line("exporting"):
        record = export(at_step(source, step), out_dir, layout, merge, options)
    serve_command = record.get("serve")
    if as_json:
        result = {"directory": str(out_dir), "checks": record["checks"]}
        if serve_command:
            result["serve"] = runnable(serve_command)
        print_json(result)
        return
    print_checks(record["checks"])
    if serve_command:
        print(f"start the server: {runnable(serve_command)}")


@model_commands.command(
    "verify",
    rich_help_panel=MODELS,
    epilog=help_examples(
        "moe-train verify runs/quickstart/export_hf",
        "moe-train verify runs/quickstart/export_hf --run runs/quickstart/lora --proof tensors",
        "moe-train verify merged_model --suite results",
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
    step: Step = None,
    suite: Annotated[
        Path | None,
        typer.Option(metavar="RESULT", help="Result of `evaluate --suite --out`; checks that the files give the same answers."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Repeat the verification of an export, as far as possible on this machine.

    Exit code 1 if the files are no longer what was exported.
    """
    from moe_train.commands.at_step import at_step
    from moe_train.commands.verify import verify
    from moe_train.commands.verify_answers import verify_answers
    from moe_train.machine.compile_cache import use_compile_cache

    if step is not None:
        if run is None:
            raise typer.BadParameter("--step chooses a checkpoint of the run that was exported; name that with --run")
        run = at_step(run, step)
    use_compile_cache()
    with progress_line("verifying"):
        _, results = verify(directory, base, run, depth, adapter)
        if suite is not None:
            results = [*results, *verify_answers(directory, suite)]
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
    rich_help_panel=MODELS,
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
    rich_help_panel=MODELS,
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

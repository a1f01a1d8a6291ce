"""The command `moe-train`: each subcommand reads its arguments, calls one function, and shows what it returned.

Imports that cost time stand inside the commands, so that `--help` answers at once. Exit codes: 0 done; 2 what was
asked for cannot be done as asked, with one clear line; 1 a fault while running; 75 stopped before the end, start again.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from moe_train.cli import adapters
from moe_train.cli import data as cli_data
from moe_train.cli.arguments import AsJson, ConfigPath, ModelDir, OutDir, Overrides, ProofDepth, load_run
from moe_train.cli.terminal import print_answers, print_checks, print_json, print_table, waiting
from moe_train.machine import processes

app = typer.Typer(
    name="moe-train",
    help="Train, adapt and ship sparse Mixture-of-Experts transformers of the Mistral family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer = typer.Typer(name="tokenizer", help="Make a tokenizer.", no_args_is_help=True)
app.add_typer(tokenizer)
app.add_typer(cli_data.app)
app.add_typer(adapters.app)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    pass  # `main` reads --debug, since it is main that meets the error


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train as CONFIG says; a run that was stopped continues from its last checkpoint."""
    written = load_run(config, overrides)
    from moe_train.commands.train import train as run_training

    raise typer.Exit(run_training(written))


@app.command()
def inspect(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the resolved config and every parameter (shape, dtype, sharding, bytes per device), then stop."""
    written = load_run(config, overrides)
    from moe_train.commands import inspect as inspection
    from moe_train.config import yaml_file

    with waiting("working out shapes"):
        report = inspection.inspect(written)
    if as_json:
        print_json({"config": report.config.model_dump(mode="json"), "parameters": report.parameters, **report.totals})
    else:
        print(yaml_file.dump(report.config))
        print_table(report.parameters)
        print_answers(report.totals)


@app.command()
def evaluate(
    directory: ModelDir,
    data: Annotated[list[Path], typer.Option("--data", help="A file of records; may be repeated.")],
    as_json: AsJson = False,
) -> None:
    """Held-out loss of a run or a model on files of text or conversations."""
    from moe_train.commands.evaluate import evaluate_dir

    with waiting("evaluating"):
        answer = evaluate_dir(directory, data)
    print_answers(answer, as_json)


@app.command()
def generate(
    directory: ModelDir,
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to continue; may be repeated.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws where the temperature is above 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="A prompt is a user's turn, not text to continue.")] = False,
    as_json: AsJson = False,
) -> None:
    """Continue each prompt with a run's or a model's weights."""
    from moe_train.commands.generate import generate_dir

    with waiting("generating"):
        completions = generate_dir(directory, prompt, max_tokens, temperature, seed, chat=chat)
    if as_json:
        print_json([{"prompt": p, "completion": c} for p, c in zip(prompt, completions, strict=True)])
    else:
        print("\n\n".join(f"{p}\n{c}" if chat else p + c for p, c in zip(prompt, completions, strict=True)))


@app.command()
def export(
    source: ModelDir,
    out_dir: OutDir,
    layout: Annotated[
        Literal["hf", "mistral", "gguf", "peft", "mistral-lora", "gguf-lora"] | None,
        typer.Option("--format", help="A whole model (hf, mistral, gguf), or an adapter. Else hf, or gguf for llama.cpp."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add the adapters to the weights they adapt.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16; of gguf also float16, q8_0, …; else that of the files it started from.")
    ] = None,
    server: Annotated[
        Literal["vllm", "llama.cpp", "transformers"] | None,
        typer.Option("--for", help="Write what this server reads, and say how to start it."),
    ] = None,
    depth: ProofDepth = "full",
    max_shard_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Of one file of weights, such as 5GB.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights of a run or a model as files that other tools load, and prove them.

    OUT_DIR appears whole or not at all; the proof lies in it as export_proof.json.
    """
    from moe_train.commands.export import export as write

    layout = layout or ("gguf" if server == "llama.cpp" else "hf")
    with waiting("exporting"):
        record = write(source, out_dir, layout, merge, dtype=dtype, depth=depth, server=server, max_shard_size=max_shard_size)
    command = record.get("serve")
    if as_json:
        print_json({"directory": str(out_dir), "checks": record["checks"], **({"serve": command} if command else {})})
        return
    print_checks(record["checks"])
    if command:
        print(f"serve it: {command}")


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` wrote.")],
    base: Annotated[Path | None, typer.Option(help="The model it started from: whether this is a merge into it.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="With --base: the adapter that was merged, every tensor anew.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run that was exported: every tensor, merged anew.")] = None,
    depth: ProofDepth = "full",
    as_json: AsJson = False,
) -> None:
    """Repeat the proof of an export, as far as it can be repeated here. Exit code 1 where something is not as it was."""
    from moe_train.commands.verify import verify as again

    with waiting("verifying"):
        _, checks = again(directory, base, run, depth, adapter)
    failed = [check.name for check in checks if check.passed is False]
    if as_json:
        print_json({"directory": str(directory), "passed": not failed, "checks": [check._asdict() for check in checks]})
    else:
        print_checks([check._asdict() for check in checks])
    if failed:
        print(f"moe-train: {directory} is not what was exported: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


@app.command("extend-vocab")
def extend_vocab(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A model in Hugging Face's or Mistral's layout.")],
    out_dir: OutDir,
    tokenizer: Annotated[
        str, typer.Option(help="A version of Mistral's sentencepiece model (v3), a tokenizer's file, or its folder.")
    ],
    layout: Annotated[Literal["hf", "mistral"], typer.Option("--format", help="The layout that is written.")] = "hf",
    as_json: AsJson = False,
) -> None:
    """Grow a model's vocabulary to a larger tokenizer's: 32000 tokens to the 32768 of v3, which tool calls need."""
    from moe_train.commands.extend_vocab import extend_vocab as extend

    with waiting("writing the model"):
        answer = extend(base, out_dir, tokenizer, layout)
    print_answers(answer, as_json)


@app.command()
def upcycle(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A dense model of the family, in any layout that is read.")],
    out_dir: OutDir,
    experts: Annotated[int, typer.Option(min=2, help="Copies of each feed-forward part.")] = 8,
    experts_per_token: Annotated[int, typer.Option(min=1, help="Experts that a token goes to.")] = 2,
    noise: Annotated[float, typer.Option(min=0.0, help="Parts the copies: a share of each matrix's standard deviation.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the routers and of the noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a Mixtral of a dense model: its feed-forward parts copied into experts, behind new routers."""
    from moe_train.commands.upcycle import upcycle as write

    with waiting("copying experts"):
        answer = write(base, out_dir, experts, experts_per_token, noise, seed)
    print_answers(answer, as_json)


@app.command()
def plan(
    config: ConfigPath,
    topology: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="v5p:4x4x4, v5e:4x4, v6e:8x8, tpu7x:2x2x2; by a cloud's name v5p-64 (TensorCores, 32 chips), v5litepod-16; "
            "h100x8. Several slices or hosts: 2xv5p:4x4x4, 4xh100x8.",
        ),
    ],
    overrides: Overrides = None,
    batch: Annotated[
        Literal["keep", "any"], typer.Option(help="keep: the config's batch_size; any: as many sequences as fit at once.")
    ] = "keep",
    by: Annotated[
        Literal["speed", "bytes"],
        typer.Option(help="Rank by tokens per second, or by the bytes that each token makes a device receive."),
    ] = "speed",
    compile_best: Annotated[int, typer.Option("--compile", min=1, metavar="N", help="Compile the best until N fit.")] = 1,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Rank by the model alone; needs no compiler.")] = False,
    compile_only: Annotated[bool, typer.Option("--compile-only", help="Compile the config as it is.")] = False,
    price: Annotated[float | None, typer.Option(min=0.0, help="Dollars per chip and hour, in place of the list price.")] = None,
    hlo: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the best program that was compiled.")] = None,
    config_out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the best choice as a complete config.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what CONFIG takes on hardware that is not here: memory, bytes, time, money; and which mesh, transport, remat and
    microbatches are best. Needs libtpu, or JAX's CUDA plugin, unless --no-compile."""
    written = load_run(config, overrides)
    if no_compile and (compile_only or hlo):
        raise ValueError(f"--no-compile leaves nothing for {'--compile-only' if compile_only else '--hlo'}; leave one out")
    for file in (hlo, config_out):
        if file is not None and not file.parent.is_dir():
            raise FileNotFoundError(f"{file}: there is no folder {file.parent}")
    from moe_train.commands.plan import plan as make_plan
    from moe_train.config import yaml_file
    from moe_train.machine.files import write_text
    from moe_train.plan import answer as planning
    from moe_train.plan import answer_json, answer_table

    with waiting("modelling" if no_compile else "modelling and compiling"):
        answer = make_plan(
            written,
            topology,
            compile_best=0 if no_compile else compile_best,
            compile_only=compile_only,
            free_batch=batch == "any",
            by=by,
            price=price,
            say=lambda text: print(text, file=sys.stderr),
        )
    if hlo is not None:
        planning.write_hlo(answer, hlo)
    if as_json:
        print_json(answer_json.as_json(answer))
    else:
        for line in answer_table.introduction(answer):
            print(line)
        print_table(answer_table.rows(answer))
        for line in answer_table.conclusion(answer):
            print(line)
    if config_out is not None:
        write_text(config_out, yaml_file.dump(planning.best_config(answer, written)))
    if answer.best is None:
        raise typer.Exit(1)


@app.command()
def bench(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Time the training step of CONFIG on synthetic tokens."""
    written = load_run(config, overrides)
    from moe_train.commands import bench as benchmark

    with waiting("timing the training step"):
        answer = benchmark.bench(written)
    print_answers(answer, as_json)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Runs, drawn over each other.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A .png, .svg or .pdf; replaced where it exists.")],
) -> None:
    """Draw what runs have measured: losses, speed, gradients, balance, the load of each expert."""
    from moe_train.commands.plot import plot as draw

    draw(runs, out)
    print(out)


@tokenizer.command("train")
def train_tokenizer(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help="Text, JSON lines, Parquet or Arrow; paths or globs.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Tokens of the vocabulary, special ones included.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet.")],
    column: Annotated[str, typer.Option(help="Where records have several columns, the one with text.")] = "text",
    as_json: AsJson = False,
) -> None:
    """Train a byte-level BPE tokenizer with Mistral's chat format."""
    from moe_train import config
    from moe_train.commands.train_tokenizer import train_bpe
    from moe_train.data.records.open_source import texts

    source = config.FileSource(name="files", files=tuple(files), record=config.TextRecord(name="text", column=column))
    with waiting("training the tokenizer"):
        trained = train_bpe(texts(source), vocab_size, out)
    print_answers({"vocab_size": trained.vocab_size, "files": [str(file) for file in trained.files]}, as_json)


@app.command()
def schema() -> None:
    """Write the JSON schema of a config, with which editors complete keys."""
    from moe_train.config.schema import json_schema

    print_json(json_schema())


@app.command()
def quickstart() -> None:
    """Text of this machine -> tokenizer -> a small Mixtral -> LoRA -> files that other tools load, in minutes."""
    from moe_train.commands.quickstart import quickstart as run

    raise typer.Exit(run())


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the package logs (tokenising takes a while; a field was ignored), as plain lines for people."""
    log, handler = logging.getLogger("moe_train"), logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # some library gives the root logger a handler, and every line would be there twice
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = True


USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)  # which typer does not export


def _in_words(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `arguments` are sys.argv's where not given."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        given = ["--debug", *(a for a in arguments if a != "--debug")] if debug else arguments
        with _log_on_stderr():
            sys.exit(app(given, prog_name="moe-train", standalone_mode=False) or 0)
    except _UsageError as error:
        if said := error.format_message():  # nothing where help was shown in its place
            print(
                f"moe-train: {said.rstrip('.')}; see {error.ctx.command_path if error.ctx else 'moe-train'} --help", file=sys.stderr
            )
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ == "JaxRuntimeError":
            processes.wait_for_loss()
        expected = isinstance(error, (*USER_ERRORS, OSError)) or type(error) is RuntimeError
        if debug or not expected:
            traceback.print_exc()
        said = _in_words(error) if expected else f"{type(error).__name__}: {error}"
        for fault in said.splitlines():  # a config may have several
            print(f"moe-train: {fault}", file=sys.stderr)
        code = 2 if isinstance(error, USER_ERRORS) else processes.UNFINISHED if isinstance(error, ConnectionError) else 1
        processes.end(code)
        sys.exit(code)

"""The command `moe-train`: each subcommand reads its arguments, calls one function, and shows what it returned.

Imports that cost time stand inside the commands, so that `--help` answers at once. Exit codes: 0 done; 2 what was
asked for cannot be done as asked, with one clear line; 1 a fault while running; 75 stopped before the end, start again.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

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
data = typer.Typer(name="data", help="Look at data before anything is trained on it.", no_args_is_help=True)
app.add_typer(data)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings that replace the file's.")]
ModelDir = Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL_DIR", help="A run, or a Hugging Face model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write the answer as JSON.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    pass  # `main` reads --debug, since it is main that meets the error


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train as CONFIG says; a run that was stopped continues from its last checkpoint."""
    from moe_train import config_file

    resolved = config_file.load(config, overrides or ())
    from moe_train.train import loop

    raise typer.Exit(loop.train(resolved))


@app.command()
def inspect(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the resolved config and every parameter (shape, dtype, sharding, bytes per device), then stop."""
    from moe_train import config_file

    resolved = config_file.load(config, overrides or ())
    from moe_train import inspect as inspection

    with _waiting("working out shapes"):
        report = inspection.inspect(resolved)
    if as_json:
        _print_json({"config": report.config.model_dump(mode="json"), "parameters": report.parameters, **report.totals})
    else:
        print(config_file.dump(report.config))
        _print_table(report.parameters)
        _print_answers(report.totals)


@app.command()
def evaluate(
    directory: ModelDir,
    data: Annotated[list[Path], typer.Option("--data", help="A file of records; may be repeated.")],
    as_json: AsJson = False,
) -> None:
    """Held-out loss of a run or a model on files of text or conversations."""
    from moe_train.train.evaluate import evaluate_dir

    with _waiting("evaluating"):
        answer = evaluate_dir(directory, data)
    _print_answers(answer, as_json)


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
    from moe_train.generate import generate_dir

    with _waiting("generating"):
        completions = generate_dir(directory, prompt, max_tokens, temperature, seed, chat=chat)
    if as_json:
        _print_json([{"prompt": p, "completion": c} for p, c in zip(prompt, completions, strict=True)])
    else:
        print("\n\n".join(f"{p}\n{c}" if chat else p + c for p, c in zip(prompt, completions, strict=True)))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run with a checkpoint.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A folder that does not exist yet.")],
    layout: Annotated[Literal["hf", "peft"], typer.Option("--format", help="A whole model, or an adapter.")] = "hf",
    merge: Annotated[bool, typer.Option("--merge", help="Add the adapters to the weights they adapt.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's weights as files that other tools load, read them back and compare."""
    from moe_train.export import export as write

    with _waiting("exporting"):
        answer = write(run_dir, out_dir, layout, merge)
    _print_answers(answer, as_json)


@app.command()
def upcycle(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A dense model of the family, in any layout that is read.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A folder that does not exist yet.")],
    experts: Annotated[int, typer.Option(min=2, help="Copies of each feed-forward part.")] = 8,
    experts_per_token: Annotated[int, typer.Option(min=1, help="Experts that a token goes to.")] = 2,
    noise: Annotated[float, typer.Option(min=0.0, help="Parts the copies: a share of each matrix's standard deviation.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the routers and of the noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a Mixtral of a dense model: its feed-forward parts copied into experts, behind new routers."""
    from moe_train.upcycle import upcycle as write

    with _waiting("copying experts"):
        answer = write(base, out_dir, experts, experts_per_token, noise, seed)
    _print_answers(answer, as_json)


@app.command()
def bench(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Time the training step of CONFIG on synthetic tokens."""
    from moe_train import config_file

    resolved = config_file.load(config, overrides or ())
    from moe_train import bench as benchmark

    with _waiting("timing the training step"):
        answer = benchmark.bench(resolved)
    _print_answers(answer, as_json)


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
    from moe_train.data.sources import texts
    from moe_train.data.tokenizer import train_bpe

    source = config.FileSource(name="files", files=tuple(files), record=config.TextRecord(name="text", column=column))
    with _waiting("training the tokenizer"):
        trained = train_bpe(texts(source), vocab_size, out)
    _print_answers({"vocab_size": trained.vocab_size, "files": [str(file) for file in trained.files]}, as_json)


@data.command("prepare")
def prepare_data(
    config: ConfigPath,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option("--to", metavar="DIR_OR_URL", help="Copy the prepared sets there, a bucket too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise and pack what CONFIG trains on ahead, in data.num_proc processes; started again, goes on where it stopped."""
    from moe_train import config_file

    resolved = config_file.load(config, overrides or ())
    from moe_train.prepare import prepare

    answer = prepare(resolved, to)
    if as_json:
        _print_json(answer)
    else:
        _print_table(answer.pop("sets"))
        _print_answers(answer)


@data.command("trace")
def trace_data(
    config: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="The training step, from 1.")] = 1,
    row: Annotated[int | None, typer.Option(help="Of its rows, from 0; all where not stated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Name the file and line of every record that a training step of CONFIG learns from."""
    from moe_train import config_file

    resolved = config_file.load(config, overrides or ())
    from moe_train.prepare import trace

    with _waiting("looking up"):
        segments = trace(resolved, step, row)
    if as_json:
        _print_json(segments)
    else:
        _print_table(segments)


@app.command()
def schema() -> None:
    """Write the JSON schema of a config, with which editors complete keys."""
    from moe_train import config_file

    _print_json(config_file.json_schema())


@app.command()
def quickstart() -> None:
    """Text of this machine -> tokenizer -> a small Mixtral -> LoRA -> files that other tools load, in minutes."""
    from moe_train.quickstart import quickstart as run

    raise typer.Exit(run())


# --- what a command says ---------------------------------------------------------------------------------------


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal's stderr while a person waits."""
    from rich.console import Console

    with Console(stderr=True).status(f"{what} …"):
        yield


def _print_json(answer: Any) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def _print_answers(answers: Mapping[str, Any], as_json: bool = False) -> None:
    if as_json:
        _print_json(answers)
    else:
        _print_table([{"": key.replace("_", " "), " ": _text(value, key)} for key, value in answers.items()])


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=any(key.strip() for key in rows[0]))
    for key, value in rows[0].items():
        table.add_column(key.replace("_", " "), justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(value, str(key)) for key, value in row.items()))
    Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)


def _text(value: Any, key: str = "") -> str:
    if key.startswith("bytes") and isinstance(value, int):
        return f"{value / 2**20:,.2f} MiB"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the package logs (tokenising takes a while; a field was ignored), as plain lines for people."""
    log, handler = logging.getLogger("moe_train"), logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `arguments` are sys.argv's where not given."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        with _log_on_stderr():
            app(["--debug", *(a for a in arguments if a != "--debug")] if debug else arguments, prog_name="moe-train")
    except Exception as error:
        expected = isinstance(error, (*USER_ERRORS, OSError)) or type(error) is RuntimeError
        if debug or not expected:
            traceback.print_exc()
        said = str(error) if expected else f"{type(error).__name__}: {error}"
        for fault in said.splitlines():  # a config may have several
            print(f"moe-train: {fault}", file=sys.stderr)
        sys.exit(2 if isinstance(error, USER_ERRORS) else 1)

"""The command line `moe-train`: each command reads its arguments, calls one function of `commands`, and prints the result.

Slow imports stand inside the commands, so that `--help` is fast.

Exit codes: 0 success; 1 an error while running, or a negative result; 2 the request is invalid, with one line per error;
3 a comparison does not meet a requirement (`evaluate --require`);
75 stopped before the end, and the same command continues; 130 interrupted with Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NoReturn, cast

import typer

from moe_train.cli.adapters import adapter_commands
from moe_train.cli.arguments import DATA, MODELS, READ_CONFIG, START, AsJson, help_examples
from moe_train.cli.classify import classify_commands
from moe_train.cli.configs import config_commands
from moe_train.cli.data import data_commands
from moe_train.cli.evaluate import evaluate_commands
from moe_train.cli.evidence import evidence_commands
from moe_train.cli.generate import generate_commands
from moe_train.cli.models import model_commands
from moe_train.cli.synthesize import synthesize_commands
from moe_train.cli.terminal import print_json, print_mapping, print_table, progress_line
from moe_train.cli.training import training_commands
from moe_train.machine import processes
from moe_train.machine.backend import backend_failure, use_gpu_memory
from moe_train.machine.interrupts import ends_after_signals
from moe_train.machine.program import program, runnable

app = typer.Typer(
    name="moe-train",
    help="Train, adapt and ship sparse Mixture-of-Experts transformers of the Mistral family.",
    epilog=help_examples("moe-train quickstart", "moe-train train configs/quickstart_pretrain.yaml train.steps=50"),
    no_args_is_help=True,
    # `main` prints errors itself, each in one line.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_commands = typer.Typer(name="tokenizer", help="Train a tokenizer.", no_args_is_help=True)
app.add_typer(config_commands)
app.add_typer(training_commands)
app.add_typer(evaluate_commands)
app.add_typer(model_commands)
app.add_typer(evidence_commands)
app.add_typer(generate_commands)
app.add_typer(classify_commands)
app.add_typer(tokenizer_commands, rich_help_panel=DATA)
app.add_typer(data_commands, rich_help_panel=DATA)
app.add_typer(synthesize_commands)
app.add_typer(adapter_commands, rich_help_panel=MODELS)


def _print_version(asked: bool) -> None:
    """Print the version of the package and exit, if it was asked for."""
    if asked:
        from moe_train import __version__

        print(f"moe-train {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    no_compile_cache: Annotated[
        bool, typer.Option("--no-compile-cache", help="Compile every program again; neither read nor write the cache.")
    ] = False,
) -> None:
    # `main` reads --debug, since that is where errors are caught.
    use_gpu_memory()
    if no_compile_cache:
        # The environment, since the cache is turned on inside the commands, after what can be checked without JAX.
        os.environ["MOE_TRAIN_COMPILE_CACHE"] = "off"


@app.command("quickstart", rich_help_panel=START, epilog=help_examples("moe-train quickstart"))
def quickstart_command() -> None:
    """Run the main workflow in minutes on a CPU: tokenizer, pretraining, LoRA, export and generation.

    It trains on the Python standard library's documentation, in runs/quickstart of the current directory.
    If it is interrupted, the same command continues.
    """
    from moe_train.commands.quickstart import quickstart
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache()
    raise typer.Exit(quickstart())


@app.command("doctor", rich_help_panel=START, epilog=help_examples("moe-train doctor", "moe-train doctor --json > doctor.json"))
def doctor_command(as_json: AsJson = False) -> None:
    """Show what this machine offers: versions, devices, memory, extras, compilers and caches, and what is wrong with them.

    It exits with 1 if something that every command needs does not work. No connection is made.
    """
    from moe_train.commands.doctor import examine_machine

    findings = examine_machine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        marks = {"ok": "ok", "missing": "-", "broken": "BROKEN"}
        print_table([{"part": f.part, "state": marks[f.state], "what": f.text, "remedy": f.remedy} for f in findings])
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


@tokenizer_commands.command(
    "train",
    epilog=help_examples("moe-train tokenizer train runs/quickstart/text/text_train.jsonl --vocab-size 4096 --out my_tokenizer"),
)
def train_tokenizer_command(
    files: Annotated[
        list[str], typer.Argument(metavar="FILES", help="Paths or globs of text, JSON lines, Parquet or Arrow files.")
    ],
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of tokens, control tokens included.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to create; it must be empty or not exist yet.")],
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    chat_format: Annotated[
        Literal["mistral", "chatml"], typer.Option(help="Control tokens and chat template; chatml has tools.")
    ] = "mistral",
    as_json: AsJson = False,
) -> None:
    """Train a byte-level BPE tokenizer with Mistral's chat format or ChatML."""
    from moe_train import config
    from moe_train.commands.train_tokenizer import train_tokenizer
    from moe_train.data.records.open_source import texts

    source = config.FileSource(name="files", files=tuple(files), record=config.TextRecord(name="text", column=column))
    with progress_line("training the tokenizer"):
        trained = train_tokenizer(texts(source), vocab_size, out, chat_format=chat_format)
    print_mapping({"vocab_size": trained.vocab_size, "files": [str(file) for file in trained.files]}, as_json)


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Print what the package logs, such as slow steps and warnings, as plain lines on stderr."""
    log = logging.getLogger("moe_train")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # Some libraries add a handler to the root logger, which would print every line a second time.
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = True


INTERRUPTED = 130
"""Exit code after Ctrl-C."""
TERMINATED = 143
"""Exit code after SIGTERM."""

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Exceptions for mistakes in what the user asked for; they exit with code 2."""

# Typer does not export the base class of its usage errors.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: the arguments without the program's name; None for those of the process.
    """
    is_program = arguments is None
    if is_program:
        # By default Python looks for garbage after 700 new objects, and often through all objects; imports and traces make
        # millions of objects, of which hardly any are garbage. For workload S this takes 0.4 of 8.4 CPU s of a warm start.
        gc.set_threshold(10_000, 20, 100)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    READ_CONFIG.set(None)
    # Typer accepts them only before the command, while people append them to a command that failed.
    given = [option for option in ("--debug", "--no-compile-cache") if option in arguments]
    arguments = given + [argument for argument in arguments if argument not in given]
    try:
        with _log_to_stderr(), ends_after_signals():
            # Not standalone, so that Typer raises errors instead of printing them; it returns the code of typer.Exit, or None.
            sys.exit(app(arguments, prog_name=program(), standalone_mode=False) or 0)
    except _UsageError as error:
        _print_usage_error(error)
        sys.exit(2)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
        if code in (INTERRUPTED, TERMINATED):
            print(f"moe-train: interrupted ({'Ctrl-C' if code == INTERRUPTED else 'SIGTERM'})", file=sys.stderr)
            # Of several processes, this one ends here: it must not wait for the others at JAX's exit barrier.
            processes.exit_process(code)
        if is_program and code in (processes.UNFINISHED, INTERRUPTED, TERMINATED):
            _leave(code)
        raise
    except Exception as error:
        code = _report(error, debug)
        # Of several processes, this one ends here: it must not wait for the others at JAX's exit barrier.
        processes.exit_process(code)
        if is_program:
            _leave(code)
        sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End the process past the interpreter's own end.

    After a signal threads of XLA may still run, and crash there. After a full disk libraries try to write once more, and print
    tracebacks that hide the one line of the error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_usage_error(error: typer.BadParameter) -> None:
    """Print one line about a wrong argument, and where to find help."""
    # Typer checks choices and limits through pydantic, which puts the kind of the error before what it says.
    message = error.format_message().replace(": Value error, ", ": ")
    # The message is empty if help was printed instead, for a group without a command.
    if message:
        command = error.ctx.command_path if error.ctx else program()
        print(f"moe-train: {message.rstrip('.')}; see {command} --help", file=sys.stderr)


def _report(error: Exception, debug: bool) -> int:
    """Print an error, one line for each fault, and return the exit code."""
    # Not imported, since that would import jax; a lost process makes the collectives of the others fail with it.
    if type(error).__name__ == "JaxRuntimeError":
        processes.wait_for_loss()
    if _is_passing(error):
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        print(f"moe-train: the processes lost touch with each other: {reason}; start again to continue", file=sys.stderr)
        return processes.UNFINISHED
    if failure := backend_failure(error):
        if debug:
            traceback.print_exc()
        print(f"moe-train: {runnable(failure)}", file=sys.stderr)
        return 2
    # Exactly RuntimeError: its subclasses, such as JAX's errors and RecursionError, are not messages of this package.
    is_expected = isinstance(error, (*USER_ERRORS, OSError)) or type(error) is RuntimeError
    if debug or not is_expected:
        traceback.print_exc()
    message = _message(error) if is_expected else f"{type(error).__name__}: {error}"
    config_file = READ_CONFIG.get()
    if config_file is not None and isinstance(error, USER_ERRORS):
        message = config_file.located(message)
    # A config may have several errors, each on its own line.
    for line in message.splitlines():
        print(f"moe-train: {runnable(line)}", file=sys.stderr)
    if isinstance(error, USER_ERRORS):
        return 2
    # A lost connection may work again, so the same command can continue.
    return processes.UNFINISHED if isinstance(error, ConnectionError) else 1


_PASSING = re.compile(r"gloo|DEADLINE_EXCEEDED|UNAVAILABLE|address already in use|connection (refused|reset)|timed out", re.I)
"""What a backend says if other processes are late, or a port is still taken: the same command may succeed."""


def _is_passing(error: Exception) -> bool:
    """Return whether an error of the backend is one of communication between processes."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and bool(_PASSING.search(str(error)))


def _message(error: Exception) -> str:
    """Return the message of an error; for one from the operating system, the file and the reason."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"

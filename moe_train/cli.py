"""The command `moe-train`: each subcommand reads its arguments, calls one function, and shows what it returned.

Imports that cost time stand inside the commands, so that `--help` answers at once. Exit codes: 0 done; 2 what was
asked for cannot be done as asked, with one clear line; 1 a fault while running; 75 stopped before the end, start again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moe_train import processes

if TYPE_CHECKING:
    from rich.console import Console

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
adapters = typer.Typer(name="adapters", help="Compare, merge and scale adapters.", no_args_is_help=True)
app.add_typer(adapters)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings that replace the file's.")]
ModelDir = Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL_DIR", help="A run, or a Hugging Face model.")]
TokenizerPath = Annotated[Path | None, typer.Option(help="A folder with tokenizer.json, a tekken.json or tokenizer.model.v*.")]
RecordFormat = Annotated[
    Literal["auto", "text", "json", "csv", "parquet", "arrow"],
    typer.Option("--format", help="Of the files; auto goes by names."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="OURS=THEIRS", help="A column: text=, messages=, or prompt= and completion=."),
]
ChatTemplate = Annotated[str | None, typer.Option(help="A jinja file, where the tokenizer has none or another.")]
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
    source: ModelDir,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A folder that does not exist yet.")],
    layout: Annotated[
        Literal["hf", "mistral", "gguf", "peft", "mistral-lora", "gguf-lora"],
        typer.Option("--format", help="A whole model (hf, mistral, gguf), or an adapter."),
    ] = "hf",
    merge: Annotated[bool, typer.Option("--merge", help="Add the adapters to the weights they adapt.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16; of gguf also float16, q8_0, …; else that of the files it started from.")
    ] = None,
    server: Annotated[
        Literal["vllm", "llama.cpp", "transformers"] | None,
        typer.Option("--for", help="Write what this server reads, and say how to start it."),
    ] = None,
    depth: Annotated[
        Literal["full", "tensors"], typer.Option("--proof", help="tensors: do not run the files; needs no accelerator.")
    ] = "full",
    max_shard_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Of one file of weights, such as 5GB.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights of a run or a model as files that other tools load, and prove them.

    OUT_DIR appears whole or not at all; the proof lies in it as export_proof.json.
    """
    from moe_train.export import export as write

    with _waiting("exporting"):
        record = write(source, out_dir, layout, merge, dtype=dtype, depth=depth, server=server, max_shard_size=max_shard_size)
    command = record.get("serve")
    if as_json:
        _print_json({"directory": str(out_dir), "checks": record["checks"], **({"serve": command} if command else {})})
        return
    _print_checks(record["checks"])
    if command:
        print(f"serve it: {command}")


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` wrote.")],
    base: Annotated[Path | None, typer.Option(help="The model it started from: whether this is a merge into it.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="With --base: the adapter that was merged, every tensor anew.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run that was exported: every tensor, merged anew.")] = None,
    depth: Annotated[
        Literal["full", "tensors"], typer.Option("--proof", help="tensors: do not run the files; needs no accelerator.")
    ] = "full",
    as_json: AsJson = False,
) -> None:
    """Repeat the proof of an export, as far as it can be repeated here. Exit code 1 where something is not as it was."""
    from moe_train.verify import verify as again

    with _waiting("verifying"):
        _, checks = again(directory, base, run, depth, adapter)
    failed = [check.name for check in checks if check.passed is False]
    if as_json:
        _print_json({"directory": str(directory), "passed": not failed, "checks": [check._asdict() for check in checks]})
    else:
        _print_checks([check._asdict() for check in checks])
    if failed:
        print(f"moe-train: {directory} is not what was exported: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


@app.command("extend-vocab")
def extend_vocab(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A model in Hugging Face's or Mistral's layout.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A folder that does not exist yet.")],
    tokenizer: Annotated[
        str, typer.Option(help="A version of Mistral's sentencepiece model (v3), a tokenizer's file, or its folder.")
    ],
    layout: Annotated[Literal["hf", "mistral"], typer.Option("--format", help="The layout that is written.")] = "hf",
    as_json: AsJson = False,
) -> None:
    """Grow a model's vocabulary to a larger tokenizer's: 32000 tokens to the 32768 of v3, which tool calls need."""
    from moe_train.extend_vocab import extend_vocab as extend

    with _waiting("writing the model"):
        answer = extend(base, out_dir, tokenizer, layout)
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
    from moe_train import config_file

    resolved = config_file.load(config, overrides or ())
    if no_compile and (compile_only or hlo):
        raise ValueError(f"--no-compile leaves nothing for {'--compile-only' if compile_only else '--hlo'}; leave one out")
    from moe_train.plan import answer as planning

    with _waiting("modelling" if no_compile else "modelling and compiling"):
        answer = planning.plan(
            resolved,
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
        _print_json(planning.as_json(answer))
    else:
        for line in planning.introduction(answer):
            print(line)
        _print_table(planning.rows(answer))
        for line in planning.conclusion(answer):
            print(line)
    if config_out is not None:
        planning.write_config(answer, config_out)
    if answer.best is None:
        raise typer.Exit(1)


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


@data.command("check")
def check_data(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILES", help="JSON lines, JSON, CSV, Parquet, Arrow, text; packed or not; folders, globs."),
    ] = None,
    tokenizer: TokenizerPath = None,
    run: Annotated[Path | None, typer.Option("--config", help="A run, for its data, tokenizer, seq_len and batch_size.")] = None,
    layout: RecordFormat = "auto",
    columns: Columns = None,
    chat_template: ChatTemplate = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Positions of a training row.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of an optimizer step.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="EVAL_FILES", help="Files of the evaluation set; may be repeated.")
    ] = None,
    bench: Annotated[Path | None, typer.Option(metavar="FILE", help="What `bench --json` wrote: how long an epoch takes.")] = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a corrected copy, and what was changed, to this folder.")
    ] = None,
    sample: Annotated[int | None, typer.Option(min=1, metavar="N", help="Read about N records from all over the files.")] = None,
    allow: Annotated[list[str] | None, typer.Option(metavar="RULE", help="A rule that may be broken; may be repeated.")] = None,
    show: Annotated[int, typer.Option(min=1, help="Problems to name for each rule; all are counted.")] = 10,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core where not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find what is wrong with records, and say what training on them will take.

    Exit code: 0 no problem, 1 problems found, 2 it could not be checked.
    """
    from moe_train import config_file
    from moe_train.data import check as checks
    from moe_train.data.chat import load_template
    from moe_train.data.tokenizer import load_tokenizer, tokenizer_at

    config = None if run is None else config_file.load(run)
    if (config is None) == (not files):
        raise ValueError("name files, or a run with --config, whose data.train is checked")
    chosen = config.data if config else None
    if config and not chosen:
        raise ValueError(f"{run} has no data section")
    if tokenizer is None and chosen and chosen.tokenizer is None and config and config.init_from:
        tokenizer = Path(config.init_from)
    section = tokenizer_at(tokenizer) if tokenizer else chosen.tokenizer if chosen else None
    if section is None:
        raise ValueError("state --tokenizer: tokens and chat format depend on it")
    loaded = load_tokenizer(section)
    if chosen:
        sources = checks.sources_of(chosen.train)
        evaluation = checks.sources_of(chosen.eval)
    else:
        sources = (checks.Source(tuple(files or ()), layout, checks.section_of(columns or ())),)
        evaluation = ()
    settings = checks.Settings(
        template=load_template(chat_template or (chosen.chat_template if chosen else None), loaded),
        allowed=frozenset(allow or ()),
        seq_len=seq_len or (config.train.seq_len if config else None),
        batch_size=batch_size or (config.train.batch_size if config else None),
        against=(checks.Source(tuple(against)),) if against else evaluation,
        bench=bench,
        fix=fix,
        sample=sample,
        num_proc=num_proc or len(os.sched_getaffinity(0)),
        shown=show,
    )
    with _progress("checking") as progress:
        answer = checks.check(sources, loaded, settings, progress)
    if as_json:
        _print_json(answer)
    else:
        from moe_train.data.report import print_report

        print_report(answer, _console())
    raise typer.Exit(1 if answer["problem_counts"] else 0)


@data.command("show")
def show_data(
    file: Annotated[str, typer.Argument(metavar="FILE_OR_CONFIG", help="A file of records, or a run's YAML with its data.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Records of a file, or rows of a run's step.")] = 3,
    tokenizer: TokenizerPath = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page for a browser instead.")] = None,
    positions: Annotated[bool, typer.Option("--positions", help="With each token's position and id.")] = False,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Pack a file's records into rows of so many positions.")] = None,
    step: Annotated[int, typer.Option(min=1, help="The training step of a run.")] = 1,
    layout: RecordFormat = "auto",
    columns: Columns = None,
    chat_template: ChatTemplate = None,
    as_json: AsJson = False,
) -> None:
    """Show records as training sees them: tokens, those that are learnt in green, segments, positions."""
    from moe_train import config as sections
    from moe_train import config_file
    from moe_train.data import check, show
    from moe_train.data.chat import load_template
    from moe_train.data.tokenizer import load_tokenizer, tokenizer_at

    is_run = file.endswith((".yaml", ".yml"))
    run = config_file.load(Path(file)) if is_run else None
    stated = run.data.tokenizer if run and run.data else None
    if tokenizer is None and stated is None and run and run.init_from:
        tokenizer = Path(run.init_from)
    section = tokenizer_at(tokenizer) if tokenizer else stated
    if section is None:
        raise ValueError("state --tokenizer: tokens and chat format depend on it")
    loaded = load_tokenizer(section)
    if run is not None:
        rows = show.rows_of_run(run, count, loaded, step)
    else:
        record = check.section_of(columns or ()) or show.record_of([file], layout)
        source = sections.FileSource(name="files", files=(file,), format=layout, record=record)
        rows = show.rows_of_records(source, count, loaded, load_template(chat_template, loaded), seq_len)
    if html is not None:
        show.write_page(html, rows, loaded, file, positions)
        print(f"{html}: {show.summary(rows)}")
    elif as_json:
        _print_json(show.as_json(rows, loaded))
    else:
        show.print_rows(rows, loaded, _console(), positions)


@data.command("prepare")
def prepare_data(
    config: ConfigPath,
    overrides: Overrides = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="DIR_OR_URL", help="Copy the prepared sets there, a bucket too.")
    ] = None,
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


AdapterDir = Annotated[Path, typer.Argument(metavar="ADAPTER", help="A run with adapters, a PEFT adapter, or Mistral's own.")]


@adapters.command("diff")
def diff_adapters(
    adapter: AdapterDir,
    base: Annotated[Path | None, typer.Option(help="The base model, where the adapter names none that is here.")] = None,
    against: Annotated[Path | None, typer.Option(metavar="ADAPTER", help="Compare with these adapters of the same base.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Matrices to name; --json has all.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show how far each module, layer and expert moved: the norm of its change over the norm of its weight."""
    from moe_train.adapters import diff, show

    with _waiting("comparing"):
        found = diff(adapter, base, against)
    if as_json:
        moved = [{**m._asdict(), "relative": m.relative if m.weight else None} for m in found.moved]
        _print_json({"base": found.base, "moved": moved, "experts": found.experts()})
        return
    from rich.console import Console

    for table in show(found, top):
        Console(width=None if sys.stdout.isatty() else 200).print(table)


@adapters.command("merge")
def merge_adapter(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model that the adapter belongs to.")],
    adapter: AdapterDir,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Of the files; else that of the base's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write BASE with the adapter added, as a Hugging Face model, proved."""
    from moe_train.adapters import merge_into

    with _waiting("merging"):
        record = merge_into(base, adapter, out_dir, dtype)
    if as_json:
        _print_json({"directory": str(out_dir), "checks": record["checks"]})
    else:
        _print_checks(record["checks"])


@adapters.command("scale")
def scale_adapter(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A PEFT adapter.")],
    factor: Annotated[float, typer.Argument(metavar="FACTOR", help="What its deltas are multiplied with.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    as_json: AsJson = False,
) -> None:
    """Write a PEFT adapter that does FACTOR as much; every tensor keeps its bytes."""
    from moe_train.adapters import scale

    _print_answers(scale(adapter, factor, out_dir), as_json)


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


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar on a terminal's stderr; it is told the bytes done, the bytes in all, and the records done."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TextColumn("{task.fields[records]:,} records"),
    )
    console = Console(stderr=True)
    with bars.Progress(
        *columns, bars.TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None, records=0)
        yield lambda done, total, records: bar.update(task, completed=done, total=total, records=records)


def _print_json(answer: Any) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def _print_answers(answers: Mapping[str, Any], as_json: bool = False) -> None:
    if as_json:
        _print_json(answers)
    else:
        _print_table([{"": key.replace("_", " "), " ": _text(value, key)} for key, value in answers.items()])


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def _print_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    marks = {True: "ok", False: "FAILED", None: "not checked"}
    _print_table(
        [
            {
                "check": check["name"],
                "result": marks[check["passed"]],
                "what": check["said"],
                "tolerance": str(check["figures"].get("tolerance", "")),
                "seconds": round(check["seconds"], 2),
            }
            for check in checks
        ]
    )


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=any(key.strip() for key in rows[0]))
    for key, value in rows[0].items():
        table.add_column(key.replace("_", " "), justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(value, str(key)) for key, value in row.items()))
    _console().print(table, markup=False)


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
    log.propagate = False  # some library gives the root logger a handler, and every line would be there twice
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = True


USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; `arguments` are sys.argv's where not given."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        with _log_on_stderr():
            app(["--debug", *(a for a in arguments if a != "--debug")] if debug else arguments, prog_name="moe-train")
    except Exception as error:
        if type(error).__name__ == "JaxRuntimeError":
            processes.wait_for_loss()
        expected = isinstance(error, (*USER_ERRORS, OSError)) or type(error) is RuntimeError
        if debug or not expected:
            traceback.print_exc()
        said = str(error) if expected else f"{type(error).__name__}: {error}"
        for fault in said.splitlines():  # a config may have several
            print(f"moe-train: {fault}", file=sys.stderr)
        code = 2 if isinstance(error, USER_ERRORS) else 1
        processes.end(code)
        sys.exit(code)

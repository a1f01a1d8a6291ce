"""The commands around a training run: train, inspect, plan, bench, plot, report, runs and sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_train.cli.arguments import TRAINING, AsJson, ConfigPath, Overrides, help_examples, read_config
from moe_train.cli.terminal import print_json, print_mapping, print_table, progress_line
from moe_train.machine.program import runnable

training_commands = typer.Typer()


@training_commands.command(
    "train",
    rich_help_panel=TRAINING,
    epilog=help_examples(
        "moe-train train configs/quickstart_pretrain.yaml",
        "moe-train train configs/quickstart_lora.yaml run_dir=runs/lora_lr2e-3 optimizer.learning_rate=2e-3",
    ),
)
def train_command(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Train the run that CONFIG describes; an interrupted run continues from its last checkpoint."""
    # Read before the import below, which takes seconds (jax), so that a mistake in the config is reported at once.
    config = read_config(config_path, overrides)
    from moe_train.commands.train import train
    from moe_train.machine.compile_cache import use_compile_cache
    from moe_train.run.bucket import working_folder

    use_compile_cache(working_folder(config.run_dir))
    raise typer.Exit(train(config))


@training_commands.command(
    "inspect",
    rich_help_panel=TRAINING,
    epilog=help_examples(
        "moe-train inspect configs/mixtral_8x7b_pretrain_v5p.yaml",
        "moe-train inspect configs/mixtral_8x7b_pretrain_v5p.yaml mesh.expert=4 mesh.fsdp=16 --json",
    ),
)
def inspect_command(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the resolved config and every parameter with its shape, dtype, sharding and bytes per device.

    Nothing is allocated, and the devices of the mesh need not be present.
    """
    config = read_config(config_path, overrides)
    from moe_train.commands.inspect import inspect
    from moe_train.config import yaml_file

    with progress_line("computing shapes"):
        report = inspect(config)
    if as_json:
        print_json({"config": report.config.model_dump(mode="json"), "parameters": report.parameters, **report.totals})
    else:
        print(yaml_file.dump(report.config))
        print_table(report.parameters)
        print_mapping(report.totals)


@training_commands.command(
    "plan",
    rich_help_panel=TRAINING,
    epilog=help_examples(
        "moe-train plan configs/mixtral_8x7b_pretrain_v5p.yaml --topology v5p:4x4x4 --no-compile",
        "moe-train plan configs/mixtral_8x7b_pretrain_v5p.yaml --topology 2xv5p:4x4x4 --batch any --no-compile --json",
    ),
)
def plan_command(
    config_path: ConfigPath,
    topology: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Devices to plan for: v5p:4x4x4, v5e:4x4, v6e:8x8, tpu7x:2x2x2 or h100x8; a cloud's name such as v5p-64 "
            "(which counts TensorCores, so it has 32 chips) or v5litepod-16; several slices or hosts as 2xv5p:4x4x4 or 4xh100x8.",
        ),
    ],
    overrides: Overrides = None,
    batch: Annotated[
        Literal["keep", "any"], typer.Option(help="keep: use the config's batch_size; any: try other batch sizes too.")
    ] = "keep",
    by: Annotated[
        Literal["speed", "bytes"],
        typer.Option(help="Rank by tokens per second (speed), or by the bytes that a device receives per token (bytes)."),
    ] = "speed",
    compile_best: Annotated[
        int, typer.Option("--compile", min=1, metavar="N", help="Compile the best choices until N of them fit into memory.")
    ] = 1,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Rank by the cost model alone, without a compiler.")] = False,
    compile_only: Annotated[bool, typer.Option("--compile-only", help="Compile the config as it is, without a search.")] = False,
    price: Annotated[
        float | None, typer.Option(min=0.0, help="Price in dollars per chip and hour. Default: the list price.")
    ] = None,
    hlo: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the HLO text of the best compiled program.")] = None,
    config_out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the best choice as a complete config.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict memory, traffic, time and price of CONFIG on hardware that need not be present.

    Ranks meshes, transports, rematerialization and microbatches, and compiles the best to confirm that it fits.
    Compiling needs libtpu or JAX's CUDA plugin; --no-compile needs neither. Exit code 1 if nothing fits into memory.
    """
    config = read_config(config_path, overrides)
    _check_plan_options(no_compile, compile_only, hlo, config_out)
    from moe_train.commands.plan import plan_run
    from moe_train.config import yaml_file
    from moe_train.machine.compile_cache import use_compile_cache
    from moe_train.machine.files import write_text
    from moe_train.plan import answer as planning
    from moe_train.plan import answer_json, answer_table

    use_compile_cache()
    options = planning.PlanOptions(0 if no_compile else compile_best, compile_only, batch == "any", by, price)
    with progress_line("modelling" if no_compile else "modelling and compiling"):
        # Progress goes to stderr, so that stdout holds the answer alone.
        answer = plan_run(config, topology, options, say=lambda text: print(text, file=sys.stderr))
    if hlo is not None:
        planning.write_hlo(answer, hlo)
    if as_json:
        print_json(answer_json.answer_as_json(answer))
    else:
        for line in answer_table.introduction(answer):
            print(line)
        print_table(answer_table.rows(answer))
        for line in answer_table.conclusion(answer):
            print(line)
    if config_out is not None:
        write_text(config_out, yaml_file.dump(planning.best_config(answer, config)))
    # Last, so that the table shows what does not fit.
    if answer.best is None:
        raise typer.Exit(1)


def _check_plan_options(no_compile: bool, compile_only: bool, hlo: Path | None, config_out: Path | None) -> None:
    """Check before the long work that options do not contradict each other and that files can be written."""
    if no_compile and compile_only:
        raise ValueError("--compile-only has no effect with --no-compile; leave one of them out")
    if no_compile and hlo is not None:
        raise ValueError("--hlo has no effect with --no-compile, which compiles no program; leave one of them out")
    for file in (hlo, config_out):
        if file is not None and not file.parent.is_dir():
            raise FileNotFoundError(f"{file}: the directory {file.parent} does not exist; create it first")


@training_commands.command(
    "bench",
    rich_help_panel=TRAINING,
    epilog=help_examples(
        "moe-train bench configs/quickstart_pretrain.yaml train.batch_size=8",
        "moe-train bench configs/quickstart_pretrain.yaml --profile trace",
    ),
)
def bench_command(
    config_path: ConfigPath,
    overrides: Overrides = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Trace three further steps with JAX's profiler into a folder, for xprof.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the speed of CONFIG's training step on these devices, with random weights and tokens."""
    config = read_config(config_path, overrides)
    from moe_train.commands.bench import bench
    from moe_train.machine.compile_cache import use_compile_cache
    from moe_train.machine.processes import process_started

    use_compile_cache()
    with progress_line("timing the training step"):
        answer = bench(config, process_started(), profile)
    print_mapping(answer, as_json)
    if profile is not None:
        print(f"open the trace with: xprof {profile}", file=sys.stderr)


@training_commands.command(
    "plot",
    rich_help_panel=TRAINING,
    epilog=help_examples("moe-train plot runs/quickstart/pretrain runs/quickstart/lora --out metrics.png"),
)
def plot_command(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Directories of runs, drawn into the same plots.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A .png, .svg or .pdf file; an existing file is replaced.")],
) -> None:
    """Plot the metrics of runs: loss, speed, gradient norm, expert balance and load.

    Needs matplotlib (bash launch/install.sh report).
    """
    from moe_train.commands.plot import plot

    plot(run_dirs, out)
    print(out)


@training_commands.command(
    "report",
    rich_help_panel=TRAINING,
    epilog=help_examples(
        "moe-train report runs/quickstart/pretrain --html report.html",
        "moe-train report runs/quickstart/lora --html report.html --export runs/quickstart/hf --evaluation results",
    ),
)
def report_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run, finished or not.")],
    out: Annotated[Path, typer.Option("--html", metavar="FILE", help="An .html file; an existing file is replaced.")],
    export: Annotated[
        list[Path] | None, typer.Option("--export", help="Directory of an export, for its proof and documents; may be repeated.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option("--evaluation", help="Directory of evaluate --suite --out; may be repeated.")
    ] = None,
) -> None:
    """Write one page about a run that opens without a network: curves, load of experts, goodput, data, evaluation and proof.

    What is missing is said. Exports and evaluations inside RUN_DIR are shown without being named.
    """
    from moe_train.commands.report import write_report

    write_report(run_dir, out, export or (), evaluation or ())
    print(out)


@training_commands.command("runs", epilog=help_examples("moe-train runs", "moe-train runs runs/sweep --price 3.5 --csv > runs.csv"))
def runs_command(
    directories: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]…", help="Directories of runs, or folders of them. Default: runs.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Dollars per device and hour, for the cost of each run.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the table as CSV.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show runs side by side: settings that differ, steps, losses, scores on suites, tokens, hours and cost."""
    from moe_train.commands import runs

    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json are two forms of one table; keep one of them")
    summaries = runs.summarize_runs(directories or [Path("runs")], price)
    if as_json:
        print_json([{"run": s.run, "settings": s.settings, "status": s.status, **s.figures} for s in summaries])
    elif as_csv:
        print(runs.as_csv(runs.rows_of(summaries)), end="")
    elif len(summaries[0].settings) > runs.MOST_SETTINGS:
        print_table(runs.rows_of(summaries, with_settings=False))
        print_table(runs.settings_rows(summaries))
    else:
        print_table(runs.rows_of(summaries))


@training_commands.command(
    "branch",
    epilog=help_examples(
        "moe-train branch runs/pretrain@8000 runs/pretrain_decay",
        "moe-train branch runs/pretrain runs/pretrain_decay",
    ),
)
def branch_command(
    directory: Annotated[Path, typer.Argument(metavar="RUN[@STEP]", help="Run and step of the checkpoint. Default: the newest.")],
    run_dir: Annotated[Path, typer.Argument(metavar="NEW_RUN_DIR", help="Directory to create.")],
) -> None:
    """Start a new run from a checkpoint of another, optimizer state and position in the data included.

    So a run with a WSD schedule decays from any of its checkpoints, while the original continues at its stable rate.
    """
    from moe_train.commands.branch import branch

    step = branch(directory, run_dir)
    command = runnable(f"moe-train train CONFIG run_dir={run_dir}")
    print(f"{run_dir} continues after step {step}: {command} with more train.steps or a schedule")


@training_commands.command(
    "sweep",
    epilog=help_examples(
        "moe-train sweep run.yaml optimizer.learning_rate=1e-4,3e-4,1e-3",
        "moe-train sweep run.yaml optimizer.learning_rate=1e-4,3e-4 seed=0,1 --suite kpi.yaml",
        "moe-train sweep run.yaml optimizer.learning_rate=1e-4,3e-4 --print",
    ),
)
def sweep_command(
    config_path: ConfigPath,
    overrides: Annotated[
        list[str],
        typer.Argument(metavar="KEY.PATH=VALUE[,VALUE]…", help="Settings; all combinations of values with commas are run."),
    ],
    only_print: Annotated[bool, typer.Option("--print", help="Print the command of each run, and run none.")] = False,
    suite: Annotated[
        list[Path] | None, typer.Option("--suite", help="Suite on which the runs are compared with the first; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a config once for each combination of settings, one after the other, and compare what the runs reached.

    Each run has a folder of its own in the config's run_dir. An interrupted sweep continues with the same command. Runs whose
    programs are equal, such as those that differ in their learning rate alone, are compiled once.
    """
    from moe_train.commands.sweep import commands_of, sweep_runs

    runs = sweep_runs(config_path, overrides)
    if only_print:
        print(runnable("\n".join(commands_of(config_path, runs))))
        return
    from moe_train.commands.sweep_runs import compare_runs, train_runs
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache(str(Path(runs[0].config.run_dir).parent))
    code = train_runs(runs)
    if code:
        raise typer.Exit(code)
    table, result = compare_runs(runs, suite or [])
    if as_json:
        print_json({"runs": table, **result})
        return
    print_table(table)
    print_table(result.get("comparisons", []))

"""Plot the metrics of runs: losses, speed, gradients, and the load of the experts."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_train.machine.files import JsonObject, read_object, write_bytes
from moe_train.run.writer import parse_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


class RunMetrics(NamedTuple):
    """The metrics of a run, read from `metrics.jsonl` and `run.json`."""

    name: str
    train: list[JsonObject]
    evaluations: list[JsonObject]
    resumed: list[int]
    """Steps after which the run was resumed."""


def read_run_metrics(run_dir: Path) -> RunMetrics:
    """Read the metrics of a run.

    Raises:
        FileNotFoundError: `run_dir` is not a run.
        ValueError: it has no metrics yet, or a damaged line.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} has no metrics.jsonl; state the run_dir of a run")
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # the run may be writing this line just now
        try:
            lines.append(parse_line(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}; remove the line") from error
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        raise ValueError(f"{path} has no metrics of a training step yet; wait for the first step")
    evaluations = [line for line in lines if line["kind"] == "eval"]
    return RunMetrics(str(run_dir), train, evaluations, _resumed_steps(run_dir / "run.json"))


def _resumed_steps(path: Path) -> list[int]:
    """Return the steps after which a run was resumed, from its `run.json` if there is one."""
    if not path.is_file():
        return []
    try:
        return [event["step"] for event in read_object(path)["events"] if event["event"] == "resume"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the log of a run; restore it, or remove it to plot without resumes") from error


def plot(run_dirs: list[Path], out: Path) -> None:
    """Draw runs on top of each other, and the experts of the last one. Needs the extra `report`.

    Args:
        run_dirs: the runs.
        out: a .png, .svg or .pdf file, which is replaced atomically.

    Raises:
        ValueError: the suffix is not supported, matplotlib is missing, or a run has no metrics.
    """
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out} has an unsupported format; use a name that ends in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "plots need matplotlib, which is not installed; run: bash launch/install.sh report, or pip install matplotlib"
        )
    runs = [read_run_metrics(run_dir) for run_dir in run_dirs]
    import matplotlib

    # Before pyplot is imported, so that no display is needed.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    loss, speed, experts, norms, balance, drift = panels.flat
    for i, run in enumerate(runs):
        color = f"C{i % 10}"
        _draw_metric(loss, run.train, "loss", color, alpha=0.5, label=run.name)
        _draw_metric(loss, run.evaluations, "loss", color, marker="o", label=f"{run.name}, held out")
        _draw_metric(speed, run.train, "tokens_per_second", color)
        _draw_metric(norms, run.train, "grad_norm", color)
        _draw_metric(balance, run.train, "balance", color)
        _draw_metric(drift, run.evaluations, "routing_drift", color, marker="o")
        for step in run.resumed:
            for panel in (loss, speed, norms, balance):
                panel.axvline(step, color=color, linestyle=":", linewidth=0.8)
    loss.legend(fontsize="small")
    titles = {
        loss: "loss (dotted: resumed)",
        speed: "tokens/s",
        norms: "norm of the gradient before clipping",
        balance: "load of the busiest expert (1: even)",
        drift: "share of routing choices that differ from the base model's",
    }
    norms.set_yscale("log")
    for panel, title in titles.items():
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("step")
        if not panel.lines:
            _mark_empty(panel)
    _draw_expert_load(figure, experts, runs[-1])
    picture = io.BytesIO()
    # To memory first, so that `out` is replaced at once.
    figure.savefig(picture, format=out.suffix[1:], dpi=110)
    pyplot.close(figure)
    write_bytes(out, picture.getvalue())


def _draw_metric(panel: Axes, lines: list[JsonObject], key: str, color: str, **style: Any) -> None:
    """Plot a metric over steps; for one kept per layer, the mean."""
    points = [(line["step"], np.mean(line[key])) for line in lines if line.get(key) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), color=color, linewidth=1.2, markersize=4, **style)


def _draw_expert_load(figure: Figure, panel: Axes, run: RunMetrics) -> None:
    """Draw each expert's share of its layer's assignments over the last tenth of the steps; 1 is an even share."""
    loads = [line["load"] for line in run.train if "load" in line]
    panel.set_title(f"load of experts, last tenth of {run.name}", fontsize="medium")
    if not loads:
        _mark_empty(panel)
        return
    load_LE = np.mean(loads[-max(1, len(loads) // 10) :], axis=0)
    # Shares times the number of experts: 1, the middle of the colors, is an even load.
    image = panel.imshow(load_LE * load_LE.shape[1], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    panel.set(xlabel="expert", ylabel="sparse layer")
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # stated of the base class only
    figure.colorbar(image, ax=panel)


def _mark_empty(panel: Axes) -> None:
    panel.text(0.5, 0.5, "no such metrics in this run", ha="center", va="center", transform=panel.transAxes, color="gray")
    panel.set(xticks=[], yticks=[])

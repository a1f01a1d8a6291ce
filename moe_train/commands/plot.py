"""Plot the metrics of runs: losses, speed, gradients, and the load of the experts."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_train.machine.files import write_bytes

SUFFIXES = (".png", ".svg", ".pdf")


class Story(NamedTuple):
    """What a run has written to `metrics.jsonl` and `run.json`."""

    name: str
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    resumed: list[int]
    """Steps after which the run was started again."""


def read(run_dir: Path) -> Story:
    """Read the metrics of a run.

    Raises:
        FileNotFoundError: `run_dir` is no run.
        ValueError: it has no metrics yet, or a damaged line.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} has no metrics.jsonl; name the run_dir of a run")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # the run may be writing this line just now
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from None
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        raise ValueError(f"{path} has no figures of a training step yet")
    log_path = run_dir / "run.json"
    events: list[dict[str, Any]] = []
    if log_path.is_file():
        events = json.loads(log_path.read_text(encoding="utf-8"))["events"]
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    return Story(str(run_dir), train, [line for line in lines if line["kind"] == "eval"], resumed)


def plot(run_dirs: list[Path], out: Path) -> None:
    """Draw runs on top of each other, and the experts of the last one. Needs the extra `report`.

    Args:
        run_dirs: the runs.
        out: a .png, .svg or .pdf file, which is replaced atomically.

    Raises:
        ValueError: the suffix is not supported, matplotlib is missing, or a run has no metrics.
    """
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: a picture ends in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib; run: bash launch/install.sh report, or pip install matplotlib")
    stories = [read(run_dir) for run_dir in run_dirs]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    loss, speed, experts, norms, balance, drift = panels.flat
    for i, story in enumerate(stories):
        color = f"C{i % 10}"
        _line(loss, story.train, "loss", color, alpha=0.5, label=story.name)
        _line(loss, story.evaluations, "loss", color, marker="o", label=f"{story.name}, held out")
        _line(speed, story.train, "tokens_per_second", color)
        _line(norms, story.train, "grad_norm", color)
        _line(balance, story.train, "balance", color)
        _line(drift, story.evaluations, "routing_drift", color, marker="o")
        for step in story.resumed:
            for panel in (loss, speed, norms, balance):
                panel.axvline(step, color=color, linestyle=":", linewidth=0.8)
    loss.legend(fontsize="small")
    titles = {
        loss: "loss, nats a token (dotted: started again)",
        speed: "tokens/s",
        norms: "norm of the gradient before clipping",
        balance: "load of the fullest expert (1: even)",
        drift: "assignments that differ from the base model's",
    }
    norms.set_yscale("log")
    for panel, title in titles.items():
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("step")
        if not panel.lines:
            _mark_empty(panel)
    _heat(figure, experts, stories[-1])
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix[1:], dpi=110)
    pyplot.close(figure)
    write_bytes(out, picture.getvalue())


def _line(panel: Any, lines: list[dict[str, Any]], key: str, color: str, **style: Any) -> None:
    """Plot a metric over steps; for one kept per layer, the mean."""
    points = [(line["step"], np.mean(line[key])) for line in lines if line.get(key) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), color=color, linewidth=1.2, markersize=4, **style)


def _heat(figure: Any, panel: Any, story: Story) -> None:
    """Draw each expert's share of its layer's assignments over the last tenth of the steps; 1 is an even share."""
    loads = [line["load"] for line in story.train if "load" in line]
    panel.set_title(f"load of experts, last tenth of {story.name}", fontsize="medium")
    if not loads:
        _mark_empty(panel)
        return
    load_LE = np.mean(loads[-max(1, len(loads) // 10) :], axis=0)
    image = panel.imshow(load_LE * load_LE.shape[1], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    panel.set(xlabel="expert", ylabel="sparse layer")
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=panel)


def _mark_empty(panel: Any) -> None:
    panel.text(0.5, 0.5, "none in this run", ha="center", va="center", transform=panel.transAxes, color="gray")
    panel.set(xticks=[], yticks=[])

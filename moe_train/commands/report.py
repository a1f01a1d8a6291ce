"""`moe-train report`: one page about a run that needs no network, made from the records that the run has left."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.commands import report_html as html
from moe_train.commands.report_charts import COLORS, Curve, Point, chart, load_maps, picture
from moe_train.commands.report_records import RunRecords, read_records
from moe_train.machine.files import JsonObject, write_text
from moe_train.run.goodput import summarize_sessions
from moe_train.run.writer import MetricsRecord

OPEN_LAYERS = 8
"""Number of layers up to which load maps over time are shown at once."""


def write_report(run_dir: Path, out: Path, exports: Sequence[Path] = (), evaluations: Sequence[Path] = ()) -> None:
    """Write the page of a run, replacing an earlier one at once.

    Args:
        run_dir: the folder of a run; it may still be going on, or have failed.
        out: an .html file.
        exports: directories that `export` has made, whose proofs and documents are shown.
        evaluations: directories that `evaluate --suite --out` has made.

    Raises:
        FileNotFoundError: `run_dir` is no run, or a stated directory lacks its record.
        ValueError: `out` does not end in .html, or a stated record is damaged.
    """
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--html {out} does not end in .html; name a file such as report.html")
    records = read_records(run_dir, exports, evaluations)
    write_text(out, report_page(records, datetime.datetime.now(datetime.UTC)))


def report_page(records: RunRecords, now: datetime.datetime) -> str:
    """Return the HTML of a report, which states that it was made at `now`."""
    style = {"finished": "good", "running": ""}.get(records.status, "bad")
    notes = "".join(f"<li>{html.text(note)}</li>" for note in records.notes)
    parts = [
        f"<h1>{html.text(str(records.run_dir))}</h1>",
        f'<p>Status: <span class="{style}">{html.text(records.status)}</span></p>',
        f"<p class=note>Made {now.isoformat(timespec='seconds')} from the records in the folder of the run.</p>",
        f"<ul class=bad>{notes}</ul>" if notes else "",
        html.section("Figures", html.pairs(_figures(records))),
        html.section("Curves", *_curves(records), otherwise="No step has been measured yet."),
        html.section("Load of the experts", _loads(records), otherwise="No loads: a dense model, or no step yet."),
        html.section("Goodput", _goodput(records), otherwise="The run has no goodput.json; runs of earlier versions have none."),
        html.section("Data", _data(records), otherwise="No manifest of the training data."),
        html.section("Evaluation", *_evaluation(records), otherwise="No held-out loss and no suite was measured."),
        html.section(
            "Proof of the exports",
            *_proofs(records),
            otherwise="No export was named: moe-train export, then moe-train report RUN --export DIR --html OUT.",
        ),
        html.section("Documents", _documents(records), otherwise="No export was named, and documents are made with exports."),
        html.section("Starts and stops", *_events(records), otherwise="run.json is missing."),
        html.section("Config", _config(records), otherwise="config.yaml is missing."),
    ]
    return html.page(f"{records.run_dir.name}: report", [part for part in parts if part])


def _figures(records: RunRecords) -> dict[str, Any]:
    """Return the figures of a run in a few lines; what is not known is None."""
    train = records.of_kind("train")
    measured = [line for line in records.of_kind("eval") if line.get("loss") is not None]
    best = min(measured, key=lambda line: line["loss"], default=None)
    last = train[-1] if train else {}
    starts = [event for event in records.events if event["event"] in ("start", "resume")]
    hardware = starts[-1].get("hardware", {}) if starts else {}
    return {
        "last step": last.get("step"),
        "loss": last.get("loss"),
        "lowest held-out loss": None if best is None else f"{best['loss']:.4f} at step {best['step']:,}",
        "tokens per second (median)": _median(train, "tokens_per_second"),
        "MFU (median)": _median(train, "mfu"),
        "skipped steps": last.get("skipped"),
        "devices": f"{hardware['devices']} x {hardware.get('device')}" if "devices" in hardware else None,
        "starts": len(starts) or None,
    }


def _median(lines: Sequence[MetricsRecord], key: str) -> float | None:
    values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
    return statistics.median(values) if values else None


def _points(lines: Sequence[MetricsRecord], key: str) -> list[Point]:
    """Return (step, value) of a metric; for one kept per layer, the mean."""
    points: list[Point] = []
    for line in lines:
        if key not in line:
            continue
        value = line[key]
        if isinstance(value, list):
            value = float(np.mean(value)) if value and all(isinstance(x, int | float) for x in value) else None
        points.append((line["step"], value if isinstance(value, int | float) else None))
    return points


def _curves(records: RunRecords) -> list[str]:
    """Return the charts of everything that was measured over steps."""
    train, held_out = records.of_kind("train"), records.of_kind("eval")
    losses = [Curve("training", _points(train, "loss")), Curve("held-out", _points(held_out, "loss"), dots=True)]
    suites = sorted({key for line in records.of_kind("suite") for key in line} - {"kind", "step", "not_graded"})
    scores = [Curve(name, _points(records.of_kind("suite"), name), dots=True) for name in suites]
    drift = [Curve("drift", _points(held_out, "routing_drift"), dots=True)]
    marks = records.resumed

    def one(title: str, key: str, log_scale: bool = False) -> str:
        return chart(title, [Curve(key, _points(train, key))], marks, log_scale)

    return [
        chart("loss (dotted lines: resumed)", losses, marks),
        one("norm of the gradient before clipping", "grad_norm", log_scale=True),
        one("learning rate", "learning_rate"),
        one("tokens per second", "tokens_per_second"),
        one("MFU", "mfu"),
        one("load of the busiest expert (1: even)", "balance"),
        one("entropy of the routers (mean of the layers)", "router_entropy"),
        one("share of experts that are hardly used", "dead_experts"),
        one("share of the wall time that went into steps", "goodput"),
        chart("share of routing choices that differ from the base model's", drift, marks),
        chart("scores on suites", scores, marks),
    ]


def _loads(records: RunRecords) -> str:
    """Return the load maps: all layers at the end of the run, and each layer over time."""
    loads = [(line["step"], line["load"]) for line in records.of_kind("train") if line.get("load")]
    maps = load_maps(loads)
    if maps is None:
        return ""
    load_SLE = maps.load_SLE
    last = load_SLE[-max(1, len(load_SLE) // 10) :].mean(axis=0)
    layers, experts = last.shape
    scale = max(4, min(24, 480 // experts))
    height = max(4, min(24, 480 // layers)) * layers
    overview = picture(last, scale * experts, height, "load of each expert (across) of each sparse layer (down), last steps")
    figures = [f"<figure>{overview}<figcaption>last tenth: experts across, {layers} sparse layers down</figcaption></figure>"]
    over_time = []
    for layer in range(layers):
        title = f"sparse layer {layer}: steps {maps.steps[0]:,} to {loads[-1][0]:,} across, {experts} experts down"
        image = picture(load_SLE[:, layer].T, 480, max(48, min(256, 8 * experts)), title)
        over_time.append(f"<figure>{image}<figcaption>{html.text(title)}</figcaption></figure>")
    note = "<p class=note>White: an even share. Red: twice as much or more. Blue: idle.</p>"
    return note + figures[0] + html.folded("over time", "".join(over_time), is_open=layers <= OPEN_LAYERS)


def _goodput(records: RunRecords) -> str:
    """Return the shares of the wall time as a bar and a table."""
    if not records.sessions:
        return ""
    summary = summarize_sessions(records.sessions)
    bar = ""
    rows: list[JsonObject] = []
    for number, (name, share) in enumerate(summary.shares.items()):
        color = COLORS[number % len(COLORS)]
        bar += f'<span style="width: {100 * share:.2f}%; background: {color}" title="{html.text(name)} {share:.1%}"></span>'
        rows.append({"what": name, "share": f"{share:.1%}", "hours": share * summary.seconds / 3600})
    note = (
        "productive: steps that were not done again. restart: from the end of a process to the next one, steps that were done "
        "again, and later starts. start: opening data and weights, and self-tests."
    )
    return f"<div class=bar>{bar}</div>{html.table(rows)}<p class=note>{note}</p>"


def _data(records: RunRecords) -> str:
    """Return what was trained on: sets, and the files of each."""
    starts = [event for event in records.events if event["event"] in ("start", "resume")]
    epochs = starts[-1].get("epochs", {}) if starts else {}
    rows: list[JsonObject] = []
    files: list[JsonObject] = []
    for number, entry in enumerate(records.data):
        rows.append(
            {
                "set": number,
                "files": len(entry["files"]),
                "records": entry["records"],
                "tokens": entry["tokens"],
                "trained_on": entry["loss_tokens"],
                "too_long": entry.get("too_long"),
                "licence": entry.get("licence") or "not stated",
                "origin": entry.get("origin") or "not stated",
                "hash": str(entry.get("hash", ""))[:16],
            }
        )
        for file in entry["files"]:
            files.append({"set": number, **file} if isinstance(file, dict) else {"set": number, "file": file})
    passes = html.pairs({f"passes over {name}": count for name, count in epochs.items()}) if epochs else ""
    return html.table(rows) + passes + html.folded("files", html.table(files)) if rows else ""


def _evaluation(records: RunRecords) -> list[str]:
    """Return held-out losses, scores during the run, and results on suites."""
    parts = []
    held_out = records.of_kind("eval")
    if held_out:
        best = min(held_out, key=lambda line: line["loss"] if line.get("loss") is not None else float("inf"))
        rows = []
        for name, line in (("first", held_out[0]), ("best", best), ("last", held_out[-1])):
            scalars = {key: value for key, value in line.items() if not isinstance(value, list) and key != "kind"}
            rows.append({"": name, **scalars})
        parts.append(f"<h3>Held-out loss</h3>{html.table(rows)}")
    suites = records.of_kind("suite")
    if suites:
        parts.append(f"<h3>Suites during the run</h3>{html.table([_without(line, 'kind') for line in suites])}")
    for folder, result in records.evaluations.items():
        tables = [html.table(rows) for key in ("suites", "comparisons", "requirements") if (rows := _rows(result.get(key)))]
        parts.append(f"<h3>{html.text(folder)}</h3>{''.join(tables)}")
    return parts


def _rows(value: Any) -> list[JsonObject]:
    """Return rows of a record without hashes; none if it is no list of objects."""
    if not isinstance(value, list):
        return []
    return [_without(row, "digest") for row in value if isinstance(row, dict)]


def _without(row: JsonObject, key: str) -> JsonObject:
    return {name: value for name, value in row.items() if name != key}


def _proofs(records: RunRecords) -> list[str]:
    """Return the checks of each export's proof."""
    parts = []
    for folder, record in records.proofs.items():
        rows = []
        for check in record.get("checks", []):
            result = {True: "ok", False: "FAILED", None: "not checked"}.get(check.get("passed"), "not stated")
            rows.append({"check": check.get("name"), "result": result, "what": check.get("said")})
        hashes = record.get("files", {})
        listed = html.table([{"file": name, "sha256": value} for name, value in hashes.items()]) if isinstance(hashes, dict) else ""
        parts.append(f"<h3>{html.text(folder)}</h3>{html.table(rows)}{html.folded('files', listed) if listed else ''}")
    return parts


def _documents(records: RunRecords) -> str:
    """Return which documents each export has, and the text of its model card."""
    parts = []
    for folder, names in records.documents.items():
        card = Path(folder) / "README.md"
        shown = ""
        if card.is_file():
            shown = html.folded("model card", f"<pre>{html.text(card.read_text(encoding='utf-8', errors='replace'))}</pre>")
        parts.append(f"<h3>{html.text(folder)}</h3><p>{html.text(', '.join(names) or 'no documents')}</p>{shown}")
    return "".join(parts)


def _events(records: RunRecords) -> list[str]:
    """Return the starts and stops of a run, and its versions and hardware."""
    rows = []
    for event in records.events:
        changed = event.get("changed") or None
        rows.append({**{key: event.get(key) for key in ("time", "event", "step", "reason", "command")}, "changed": changed})
    starts = [event for event in records.events if event["event"] in ("start", "resume")]
    parts = [html.table(rows)]
    if starts:
        last = starts[-1]
        stated = {**last.get("hardware", {}), **last.get("versions", {}), "config sha256": last.get("config_sha256")}
        parts.append(html.folded("machine and versions of the last start", html.pairs(stated)))
    return parts


def _config(records: RunRecords) -> str:
    if records.config_text is None:
        return ""
    return html.folded("config.yaml", f"<pre>{html.text(records.config_text)}</pre>")

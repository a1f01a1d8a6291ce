"""The records of a small run, as training leaves them behind, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path

from moe_train import config
from moe_train.checkpoint.metadata import CheckpointMetadata, WeightOrigin
from moe_train.data.prepared.manifest import Manifest, Rules, SourceFile, text_of_all
from moe_train.governance.lineage import Lineage, training_of
from tests.run.tiny_config import LORA, MODEL, data, written

BASE = WeightOrigin("models/base", None, {"model.safetensors": "a" * 64})
SET = Manifest(
    licence="internal, contract | 17",
    origin=None,
    tokenizer_sha256="0" * 64,
    rules=Rules(record={"name": "chat"}, template_sha256=None, libraries={}),
    rules_sha256="1" * 64,
    too_long="error",
    dtype="uint16",
    records=400,
    empty=0,
    examples=400,
    tokens=12_345,
    loss_tokens=678,
    files=(SourceFile(path="dialogues.jsonl", sha256="2" * 64, size=9, by_line=True, records=400, tokens=12_345),),
    shards=(),
).sealed()
HARDWARE = {"device": "TPU v5p", "devices": 16}


def run_of(lora: bool = False) -> config.Run:
    """Return a resolved run, whose files do not exist."""
    tokenizer = {"name": "huggingface", "path": "tokenizer"}
    sections = {"model": MODEL, "data": data(tokenizer=tokenizer), "mesh": {"fsdp": 8}}
    if lora:
        sections |= {"lora": LORA, "init_from": "models/base"}
    return config.run_of(written(**sections))


def write_records(run_dir: Path, events: list[tuple[str, int, str]]) -> None:
    """Write what a run records; `events` are (event, step, time of day)."""
    written_events = []
    for event, step, time in events:
        entry = {"event": event, "step": step, "time": f"2026-11-03T{time}+00:00"}
        written_events.append(entry | ({"hardware": HARDWARE} if event != "stop" else {}))
    (run_dir / "run.json").write_text(json.dumps({"events": written_events}))
    (run_dir / "manifest.json").write_text(text_of_all([SET]))
    losses = [("eval", 0, 5.0), ("train", 1, 4.9), ("eval", 2, 3.5), ("eval", 3, 3.75), ("eval", 9, 1.0)]
    lines = [json.dumps({"kind": kind, "step": step, "loss": loss}) for kind, step, loss in losses]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def lineage_of(run_dir: Path, layout: str = "hf", lora: bool = False) -> Lineage:
    """Return the lineage of step 3 of a run with these records."""
    write_records(run_dir, [("start", 0, "10:00:00"), ("stop", 2, "11:00:00"), ("resume", 2, "12:00:00"), ("stop", 3, "12:30:00")])
    run = run_of(lora)
    about = CheckpointMetadata({}, 24, "data", BASE if lora else None, manifest=SET.hash)
    return Lineage("tuned", layout, run.model, run.lora, 12_000, str(run_dir), training_of(run_dir, run, about, 3))

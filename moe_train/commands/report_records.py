"""The records that a run has left, read for its report; what is missing or damaged is noted and not guessed."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.data.prepared.manifest import MANIFEST
from moe_train.machine.files import JsonObject, read_object
from moe_train.run.goodput import GOODPUT_FILE, Session, read_sessions
from moe_train.run.record import read_events
from moe_train.run.writer import MetricsRecord, parse_line

PROOF_FILE = "export_proof.json"
RESULT_FILE = "result.json"
DOCUMENTS = ("README.md", "ml_bom.cdx.json", "LICENSE", "NOTICE")
"""Names of documents that an export may hold."""


class RunRecords(NamedTuple):
    """Everything that a report shows."""

    run_dir: Path
    status: str
    """`finished`, `running`, `stopped: REASON`, `failed: REASON` or `ended without a record`."""
    metrics: dict[str, list[MetricsRecord]]
    """Records of metrics.jsonl by kind: train, eval and suite."""
    events: list[JsonObject]
    """Starts, resumes and stops."""
    sessions: list[Session]
    """What goodput.json states."""
    data: list[JsonObject]
    """The manifests of the training data."""
    config_text: str | None
    evaluations: dict[str, JsonObject]
    """Results on suites by folder."""
    proofs: dict[str, JsonObject]
    """Records of exports' proofs by folder."""
    documents: dict[str, list[str]]
    """Names of the documents in each export."""
    notes: list[str]
    """What is missing or damaged, a sentence each."""

    def of_kind(self, kind: str) -> list[MetricsRecord]:
        """Return the records of a kind, in the order of steps."""
        return self.metrics.get(kind, [])

    @property
    def resumed(self) -> list[int]:
        """Steps after which the run was resumed."""
        return [event["step"] for event in self.events if event["event"] == "resume"]


def read_records(run_dir: Path, exports: Sequence[Path] = (), evaluations: Sequence[Path] = ()) -> RunRecords:
    """Read the records of a run, of its exports and of evaluations.

    Args:
        run_dir: the folder of the run.
        exports: directories that `export` has made.
        evaluations: directories that `evaluate --suite --out` has made.

    Raises:
        FileNotFoundError: `run_dir` is no run, or a stated directory lacks its record.
    """
    if not (run_dir / "config.yaml").is_file() and not (run_dir / "run.json").is_file():
        raise FileNotFoundError(f"{run_dir} is no run: it has neither config.yaml nor run.json; name the run_dir of a run")
    notes: list[str] = []
    events = _read(notes, run_dir / "run.json", lambda: read_events(run_dir / "run.json"), [])
    sessions = _read(notes, run_dir / GOODPUT_FILE, lambda: read_sessions(run_dir), [])
    data = _read(notes, run_dir / MANIFEST, lambda: _manifests(run_dir / MANIFEST), [])
    config_text = _read(notes, run_dir / "config.yaml", lambda: (run_dir / "config.yaml").read_text(encoding="utf-8"), None)
    metrics = _metrics(run_dir / "metrics.jsonl", notes)
    exports = [*exports, *(file.parent for file in sorted(run_dir.glob(f"*/{PROOF_FILE}")))]
    evaluations = [*evaluations, *(file.parent for file in sorted(run_dir.glob(f"*/{RESULT_FILE}")))]
    proofs = {str(folder): _stated(folder, PROOF_FILE, "moe-train export made") for folder in exports}
    results = {str(folder): _stated(folder, RESULT_FILE, "moe-train evaluate --suite --out made") for folder in evaluations}
    documents = {}
    for folder in exports:
        documents[str(folder)] = [name for name in DOCUMENTS if (folder / name).is_file()]
    status = _status(run_dir, events)
    return RunRecords(run_dir, status, metrics, events, sessions, data, config_text, results, proofs, documents, notes)


def _read(notes: list[str], path: Path, read: Any, otherwise: Any) -> Any:
    """Return what `read` returns, or `otherwise` with a note if the file is missing or damaged."""
    if not path.is_file():
        notes.append(f"{path.name} is missing, so what it states is left out.")
        return otherwise
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"{path.name} is damaged and left out: {' '.join(str(error).split())[:200]}")
        return otherwise


def _manifests(path: Path) -> list[JsonObject]:
    sets = read_object(path)["sets"]
    for entry in sets:
        # Named here, so that a damaged file is noted and does not end the report.
        int(entry["records"]) + int(entry["tokens"]) + int(entry["loss_tokens"]) + len(entry["files"])
    return list(sets)


def _stated(folder: Path, name: str, maker: str) -> JsonObject:
    """Read the record of a directory that the user named."""
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}; name a directory that {maker}")
    return read_object(folder / name)


def _metrics(path: Path, notes: list[str]) -> dict[str, list[MetricsRecord]]:
    """Return the records of metrics.jsonl by kind; an incomplete last line is being written, other bad lines are noted."""
    records: dict[str, list[MetricsRecord]] = {}
    if not path.is_file():
        notes.append("metrics.jsonl is missing: the run has not measured anything yet, or the file was removed.")
        return records
    damaged = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = parse_line(line)
        except ValueError:
            damaged.append(number)
            continue
        records.setdefault(record["kind"], []).append(record)
    if damaged:
        listed = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        notes.append(f"metrics.jsonl has {len(damaged)} damaged lines, which are left out: {listed}.")
    if "train" not in records:
        notes.append("metrics.jsonl has no training step yet.")
    return records


def _status(run_dir: Path, events: Sequence[JsonObject]) -> str:
    """Return how the run stands, from its log and its lock."""
    last = events[-1] if events else {}
    if last.get("event") == "stop":
        reason = str(last.get("reason"))
        if reason == "finished":
            return reason
        return f"failed: {reason}" if ": " in reason else f"stopped: {reason}"
    return "running" if _is_locked(run_dir / ".lock") else "ended without a record: it was killed, or it runs on another machine"


def _is_locked(path: Path) -> bool:
    """Return whether a process on this machine holds the lock of a run."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

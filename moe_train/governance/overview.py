"""The first page of a folder of evidence: what is in it, the chain from raw data to served files, and the commands."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence

from moe_train.governance.markdown import TODO, mapping_table, table
from moe_train.governance.provenance import Provenance
from moe_train.governance.sealed_folder import PROVENANCE_FILE, SEAL_FILE
from moe_train.machine.files import JsonObject
from moe_train.proof.surroundings import RECORD_FILE


def overview(provenance: Provenance, written: str) -> str:
    """Return the first page: what is in the folder, and the chain from raw data to served files."""
    training = provenance.trainings[0]
    contents = {
        "training_content_summary.md": "the summary that Article 53(1)(d) of the EU AI Act asks for",
        "model_documentation.md": "the model documentation form of Annexes XI and XII",
        "compute_and_energy.md": "floating-point operations, hours, energy, and the base's figure beside them",
        PROVENANCE_FILE: "the chain below with every hash, for programs",
        "records/": "copies of the records that all of this is written from",
        SEAL_FILE: "the sha256 of each of these files",
    }
    sections = [
        f"# Evidence: {training.run.name}, step {training.step}",
        f"Written on {written} by moe_train, {provenance.code.in_words()}. {TODO} stands where no record has the answer.",
        mapping_table(contents),
        "Check that all of it is still so: `moe-train evidence --check DIR`. After filling in: `moe-train evidence --seal DIR`.",
        "## From raw data to served files",
        table(("what", "sha256", "state"), _chain_rows(provenance)),
        "## Commands",
        table(("time", "revision of the code", "command"), _command_rows(provenance)),
    ]
    return "\n\n".join(sections) + "\n"


def _chain_rows(provenance: Provenance) -> list[tuple[str, str, str]]:
    """Return a row for each raw file, prepared set, training and export."""
    rows: list[tuple[str, str, str]] = [(f"raw file {file.path}", file.sha256, file.state) for file in provenance.raw_files]
    for manifest in provenance.sets:
        rows.append(("prepared set", manifest.hash, f"{manifest.records:,} records, {manifest.tokens:,} tokens"))
    for training in reversed(provenance.trainings):
        base = "random weights" if training.base is None else training.base.source
        rows.append(
            (f"run {training.run.name}", training.data_hash or TODO, f"step {training.step}, from {base}; hash of its data")
        )
    for export in provenance.exports:
        states = Counter(file.state for file in export.files)
        state = ", ".join(f"{count} files {name}" for name, count in states.items()) or "not here"
        rows.append((f"export {export.entry.directory}", export.entry.record_sha256, f"{state}; hash of its {RECORD_FILE}"))
    return rows


def _command_rows(provenance: Provenance) -> list[tuple[str, str, str]]:
    """Return a row for each recorded command, the earliest training first."""
    rows = []
    for training in reversed(provenance.trainings):
        for session in training.sessions:
            rows.append((session["time"], _revision(session.get("code")), _command(session.get("command", ()))))
    for export in provenance.exports:
        rows.append((export.entry.time, _revision(export.code), _command(export.entry.command)))
    return rows


def _revision(code: JsonObject | None) -> str:
    if code is None:
        return "not recorded"
    dirty = " with changes" if code["is_dirty"] else ""
    return f"{code['commit'][:12]}{dirty}" if code["commit"] else f"package {code['package_sha256'][:12]}"


def _command(words: Sequence[str]) -> str:
    return f"`{shlex.join(words)}`" if words else "not recorded"

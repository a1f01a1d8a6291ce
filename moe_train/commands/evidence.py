"""`moe-train evidence`: a folder of documents and records about a trained model, and the check that it still matches the files."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

from moe_train.governance import signing
from moe_train.governance.compute import num_parameters
from moe_train.governance.ledger import NOTHING_STATED, Ledger, StatedFigures, ledger_of, ledger_page
from moe_train.governance.model_documentation import DocumentedModel, documentation_form
from moe_train.governance.overview import overview
from moe_train.governance.provenance import (
    ExportedDirectory,
    Provenance,
    checkpoint_files,
    exported_directory,
    raw_files_of,
)
from moe_train.governance.sealed_folder import PROVENANCE_FILE, SEAL_FILE, SIGNATURE_FILE, check_folder, seal_of
from moe_train.governance.training_summary import training_summary
from moe_train.governance.upstream import checkpoint_of, exports_of, trainings_of
from moe_train.machine.files import Json, JsonObject, new_directory, write_text
from moe_train.machine.revision import code_revision
from moe_train.proof.checks import Check, Finding, NotChecked, run
from moe_train.proof.surroundings import RECORD_FILE

_RECORDS_OF_RUN = ("run.json", "config.yaml", "manifest.json", "metrics.jsonl", "exports.jsonl")
_RECORDS_OF_EXPORT = (RECORD_FILE, "README.md", "ml_bom.cdx.json")


def write_evidence(
    source: Path, out: Path, run_dir: Path | None = None, stated: StatedFigures = NOTHING_STATED, key: Path | None = None
) -> JsonObject:
    """Write a folder of evidence about a run or an export, and seal it.

    Args:
        source: A run (`RUN` or `RUN@STEP`), or a directory that was exported from one.
        out: The folder to create; it must be empty or not exist yet.
        run_dir: The run of an export, if it is not where the export's record says.
        stated: Figures that no record has.
        key: Private key that signs the folder; None for no signature.

    Returns:
        What was written, ready for JSON.

    Raises:
        FileNotFoundError: The run of an export is not here, or there is no such checkpoint.
        ValueError: A record contradicts another one.
    """
    origin = checkpoint_of(source, run_dir)
    trainings = trainings_of(origin)
    sets = trainings[0].data
    provenance = Provenance(
        tuple(raw_files_of(sets)),
        sets,
        trainings,
        str(origin.run_dir),
        checkpoint_files(origin.run_dir, origin.step),
        tuple(exported_directory(entry) for entry in exports_of(origin, source)),
        code_revision(),
    )
    with new_directory(out) as folder:
        for file, text in _pages(provenance, ledger_of(trainings, stated)).items():
            (folder / file).write_text(text, encoding="utf-8")
        _copy_records(folder / "records", provenance)
        seal = seal_of(folder)
        (folder / SEAL_FILE).write_text(_json_text(seal), encoding="utf-8")
        if key is not None:
            signing.sign(folder, key)
    return {
        "directory": str(out),
        "run": f"{origin.run_dir}@{origin.step}",
        "exports": len(provenance.exports),
        "raw_files": dict(Counter(file.state for file in provenance.raw_files)),
        "todo": seal["todo"],
        "signed": key is not None,
    }


def seal_evidence(folder: Path, key: Path | None) -> JsonObject:
    """Seal a folder of evidence again, after people have filled in its pages, and sign it if a key is given.

    Raises:
        FileNotFoundError: The folder is none of evidence.
    """
    _require_evidence(folder)
    seal = seal_of(folder)
    write_text(folder / SEAL_FILE, _json_text(seal))
    # It speaks of the files before the change.
    (folder / SIGNATURE_FILE).unlink(missing_ok=True)
    if key is not None:
        signing.sign(folder, key)
    return {"directory": str(folder), "files": len(seal["files"]), "todo": seal["todo"], "signed": key is not None}


def check_evidence(folder: Path, public_key: Path | None) -> list[Check]:
    """Check that a folder of evidence is as it was sealed, and that the files that it speaks of are, too.

    Args:
        folder: The folder.
        public_key: Key that its signature must be by; None to leave the signature unchecked.

    Raises:
        FileNotFoundError: The folder is none of evidence.
        ValueError: A key is stated, and the library that verifies signatures is not installed.
    """
    _require_evidence(folder)
    if public_key is not None:
        signing.signing_library()  # a library that is missing is no fault of the evidence
    checks = check_folder(folder)
    return [*checks, run("signature", lambda: _signature(folder, public_key))]


def _signature(folder: Path, public_key: Path | None) -> Finding:
    """Verify the signature of a folder of evidence."""
    if public_key is not None:
        return signing.check_signature(folder, public_key)
    if (folder / SIGNATURE_FILE).exists():
        raise NotChecked("name the key that it must be by: --key PUBLIC.pem")
    raise NotChecked("the evidence is not signed")


def _require_evidence(folder: Path) -> None:
    if not (folder / SEAL_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} is no evidence: it has no {SEAL_FILE}; write it: moe-train evidence RUN_OR_EXPORT {folder}"
        )


def _json_text(value: Json) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _pages(provenance: Provenance, ledger: Ledger) -> dict[str, str]:
    """Return file name -> text of everything that is written, apart from copies of records and the seal."""
    training = provenance.trainings[0]
    name = training.run.name
    written = datetime.datetime.now(datetime.UTC).date().isoformat()
    files = "".join(f"{digest}  {file}\n" for file, digest in sorted(provenance.checkpoint.items()))
    model = DocumentedModel(
        name,
        provenance.trainings,
        num_parameters(training.run),
        {export.entry.directory: _facts(export) for export in provenance.exports},
        hashlib.sha256(files.encode()).hexdigest(),
        ledger,
    )
    chain = {**provenance.to_json(), "compute": ledger.to_json()}
    return {
        "README.md": overview(provenance, written),
        "training_content_summary.md": training_summary(name, provenance.trainings, written),
        "model_documentation.md": documentation_form(model),
        "compute_and_energy.md": ledger_page(training, ledger),
        PROVENANCE_FILE: _json_text(chain),
    }


def _facts(export: ExportedDirectory) -> str:
    return f"{export.entry.layout}, sha256 {export.entry.record_sha256} of {RECORD_FILE}"


def _copy_records(folder: Path, provenance: Provenance) -> None:
    """Copy the records of the run and of each export that is here."""
    folder.mkdir()
    for name in _RECORDS_OF_RUN:
        if (Path(provenance.run_dir) / name).is_file():
            shutil.copyfile(Path(provenance.run_dir) / name, folder / name)
    for number, export in enumerate(provenance.exports, 1):
        place = folder / f"export_{number}"
        for name in _RECORDS_OF_EXPORT:
            if (Path(export.entry.directory) / name).is_file():
                place.mkdir(exist_ok=True)
                shutil.copyfile(Path(export.entry.directory) / name, place / name)

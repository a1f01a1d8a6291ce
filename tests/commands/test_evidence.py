"""Evidence of a run: every page is filled from records, and a changed file is noticed; the seal covers what people fill in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train.commands.evidence import StatedFigures, check_evidence, seal_evidence, write_evidence
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.governance.exports_of_run import ExportEntry, hash_of_record, note_export
from moe_train.machine.mesh import make_mesh
from tests.commands.runs import MESH, MODEL, save_run
from tests.governance.lineages import SET, write_records
from tests.random_parameters import random_parameters


@pytest.fixture(scope="module")
def run_with_export(small_tokenizer: HuggingFace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the records of a training, a raw file, and the record of an export whose weights are a text."""
    folder = tmp_path_factory.mktemp("evidence")
    run = folder / "run"
    with jax.set_mesh(make_mesh(MESH)):
        save_run(run, random_parameters(MODEL), small_tokenizer)
    write_records(run, [("start", 0, "10:00:00"), ("stop", 1, "11:30:00")])
    export = folder / "hf"
    export.mkdir()
    (export / "model.safetensors").write_text("weights")
    files = {"model.safetensors": "5dbbb65c6dab8e3f5ae5a8ba1d4cf3c0e2e0d3e8a7d3f1f6a4cb2c9d6c4fd0aa"}
    (export / "export_proof.json").write_text(
        json.dumps({"run": "run", "source": "run", "step": 1, "format": "hf", "data_sha256": "", "files": files})
    )
    note_export(
        run, ExportEntry("2026-11-03T12:00:00+00:00", str(export), "hf", 1, hash_of_record(export), ("moe-train", "export"))
    )
    return folder


def results(folder: Path) -> dict[str, tuple[bool | None, str]]:
    return {check.name: (check.passed, check.summary) for check in check_evidence(folder, None)}


def test_pages_state_what_records_state_and_a_seal_notices_changes(run_with_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dialogues.jsonl").write_text("raw\n")
    answer = write_evidence(run_with_export / "run", tmp_path / "out", stated=StatedFigures(base_flops=1e12, power_watts=500.0))
    assert answer["exports"] == 1 and answer["raw_files"] == {"changed": 1}  # the manifest states the hash of another content
    summary = (tmp_path / "out/training_content_summary.md").read_text()
    assert (
        "less than 1 billion tokens (12,345 tokens" in summary and "| 2.2.2 obtained from other third parties | TODO |" in summary
    )
    assert f"`{SET.hash[:16]}`" in summary and "internal, contract \\| 17" in summary
    ledger = (tmp_path / "out/compute_and_energy.md").read_text()
    assert "12 kWh: 500 W × 16 devices × 1.5 hours" in ledger and "none: training started from random weights" in ledger
    form = (tmp_path / "out/model_documentation.md").read_text()
    assert "thousand" in form and "| legal name of the provider | TODO |" in form and "| last | 0 | 5.0000 |" in form
    chain = json.loads((tmp_path / "out/provenance.json").read_text())
    assert chain["checkpoint"]["files"] and chain["exports"][0]["files"][0]["state"] == "changed"
    assert (tmp_path / "out/records/export_1/export_proof.json").is_file()

    before = results(tmp_path / "out")
    assert before["documents"][0] is True and before["checkpoint"][0] is not False
    assert before["raw data"] == (False, "dialogues.jsonl: the content is not the one that was recorded")
    Path("dialogues.jsonl").unlink()
    assert results(tmp_path / "out")["raw data"][0] is None  # an auditor need not have the data

    page = tmp_path / "out/model_documentation.md"
    page.write_text(form.replace("| legal name of the provider | TODO |", "| legal name of the provider | Example Bank |"))
    passed, fault = results(tmp_path / "out")["documents"]
    assert passed is False and fault.startswith(
        "model_documentation.md: changed after it was sealed; if that was meant, seal again"
    )
    sealed = seal_evidence(tmp_path / "out", None)
    assert sealed["todo"]["model_documentation.md"] == answer["todo"]["model_documentation.md"] - 1
    assert results(tmp_path / "out")["documents"][0] is True


def test_an_export_leads_to_its_run_also_from_elsewhere(run_with_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = write_evidence(run_with_export / "hf", tmp_path / "out")
    assert answer["run"] == f"{run_with_export / 'run'}@1" and answer["exports"] == 1
    with pytest.raises(FileNotFoundError, match="neither a run nor a directory that `moe-train export` wrote"):
        write_evidence(tmp_path, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="is no evidence"):
        check_evidence(tmp_path, None)
    (tmp_path / "damaged").mkdir()
    for name in ("evidence.json", "provenance.json"):
        (tmp_path / "damaged" / name).write_text('{"files": []}')
    with pytest.raises(ValueError, match=r"provenance\.json is damaged .*; restore them, or write the evidence again"):
        check_evidence(tmp_path / "damaged", None)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7|has no checkpoint of step 7; it has 1"):
        write_evidence(Path(f"{run_with_export}/run@7"), tmp_path / "other")
    moved: dict[str, Any] = json.loads((run_with_export / "hf/export_proof.json").read_text())
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/export_proof.json").write_text(json.dumps(moved | {"source": "gone"}))
    with pytest.raises(FileNotFoundError, match="was exported from the run gone, which is not here; name it with --run RUN"):
        write_evidence(tmp_path / "moved", tmp_path / "other")
    assert write_evidence(tmp_path / "moved", tmp_path / "other", run_dir=run_with_export / "run")["exports"] == 2
    (tmp_path / "moved/export_proof.json").write_text(json.dumps(moved | {"data_sha256": "another"}))
    with pytest.raises(ValueError, match="its data are others"):
        write_evidence(tmp_path / "moved", tmp_path / "another", run_dir=run_with_export / "run")

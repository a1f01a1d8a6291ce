"""What is found in the folder of a run without being named."""

from __future__ import annotations

import json
from pathlib import Path

from moe_train.commands.report_records import read_records


def test_exports_and_evaluations_inside_a_run_are_found(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: a\n")
    for folder, file in (("hf", "export_proof.json"), ("results", "result.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(json.dumps({"folder": folder}))
    (tmp_path / "hf" / "ml_bom.cdx.json").write_text("{}")
    records = read_records(tmp_path)
    assert records.proofs == {str(tmp_path / "hf"): {"folder": "hf"}}
    assert records.evaluations == {str(tmp_path / "results"): {"folder": "results"}}
    assert records.documents == {str(tmp_path / "hf"): ["ml_bom.cdx.json"]}
    assert records.of_kind("train") == [] and records.resumed == []

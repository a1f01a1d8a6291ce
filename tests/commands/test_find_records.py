"""A record leads to the steps that learnt from it, as `data trace` leads from steps to records; erasing leaves everything else."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.checkpoint.metadata import CheckpointMetadata, WeightOrigin, about_json
from moe_train.commands.erase_records import erase_records
from moe_train.commands.find_records import find_records
from moe_train.config import yaml_file
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.records.search import wanted
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.governance.exports_of_run import ExportEntry, note_export
from tests.run.tiny_config import MODEL, written

SECRET = "the parcel of Jane Doe"
STEPS = 12


def write_data(folder: Path) -> list[Path]:
    """Write three files, in two of which a record contains the secret text; one of them escapes it."""
    lines = [json.dumps({"text": f"record {i} " + "some text " * (1 + i % 4)}) for i in range(12)]
    first = [*lines[:5], json.dumps({"text": f"about {SECRET} and more"}), *lines[5:]]
    names = [folder / name for name in ("a.jsonl", "b.jsonl", "held_out.jsonl")]
    names[0].write_text("\n".join(first) + "\n")
    names[1].write_text("\n".join(lines[:7]) + "\n")
    names[2].write_text(json.dumps({"text": "again " + SECRET.upper()}).replace("J", "\\u004a") + "\n")
    return names


def write_run(folder: Path, tokenizer: HuggingFace, files: list[Path]) -> tuple[Path, Loader]:
    """Write what training on two sources leaves behind, with checkpoints at steps 1, 4 and 12, and an export of each."""
    sources = [{"name": "files", "files": [str(file)], "record": {"name": "text"}} for file in files]
    sections: dict[str, Any] = {"tokenizer": {"name": "huggingface", "path": str(tokenizer.path)}, "cache_dir": f"{folder}/cache"}
    sections |= {"train": sources[:2], "eval": sources[2:]}
    run_dir = folder / "runs/one"
    run = written(run_dir=str(run_dir), data=sections, model=MODEL, train={"steps": STEPS, "batch_size": 2, "seq_len": 32})
    assert run.data is not None
    loader = Loader(run.data, "train", tokenizer, BatchRows(2, 32), seed=run.seed)
    write_checkpoints(run_dir, run, (1, 4, STEPS), CheckpointMetadata({}, 0, loader.identity, None))
    (run_dir / "manifest.json").write_text(loader.manifest)
    shutil.copytree(tokenizer.path, run_dir / "tokenizer")
    for step in (1, 4, STEPS):
        note_export(run_dir, ExportEntry("", str(folder / f"export_{step}"), "hf", step, "", ()))
    return run_dir, loader


def write_checkpoints(run_dir: Path, run: config.Config, steps: tuple[int, ...], about: CheckpointMetadata) -> None:
    for step in steps:
        place = run_dir / f"checkpoints/{step}/about"
        place.mkdir(parents=True)
        content = about_json(about._replace(config=run.model_dump(mode="json")), {"params": [], "optimizer": []}, None)
        (place / "metadata").write_text(json.dumps(content))
    (run_dir / "config.yaml").write_text(yaml_file.dump(run))
    (run_dir / "run.json").write_text('{"events": []}')


def test_find_is_the_inverse_of_trace_and_erase_leaves_all_else(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    files = write_data(tmp_path)
    run_dir, loader = write_run(tmp_path, small_tokenizer, files)
    traced = set()
    for step in range(STEPS):
        for row in range(2):
            if any(segment.file == str(files[0]) and segment.number == 6 for segment in loader.trace(step, row)):
                traced.add(step + 1)
    tuned = written(run_dir=str(tmp_path / "runs/tuned"), data={"train": [{"name": "prepared", "path": "gone"}]}, model=MODEL)
    base = WeightOrigin(str(run_dir), STEPS, {})
    write_checkpoints(tmp_path / "runs/tuned", tuned, (5,), CheckpointMetadata({}, 0, "", base))

    found = find_records(wanted(SECRET, None, False), [tmp_path / "runs"])
    (run,) = found.runs
    assert [record.location for searched in run.sets for record in searched.records] == [f"{files[0]}:6"]
    assert [record.location for record in run.held_out] == [f"{files[2]}:1"]
    assert run.steps is not None and set(run.steps) == traced and traced
    first = min(traced)
    assert run.checkpoints == tuple(step for step in (1, 4, STEPS) if step >= first)
    assert run.clean_checkpoints == tuple(step for step in (1, 4, STEPS) if step < first)
    assert [entry.step for entry in run.exports] == list(run.checkpoints)
    assert [later.run_dir for later in found.later_runs] == [tmp_path / "runs/tuned"] and found.later_runs[0].checkpoints == (5,)
    assert f"{tmp_path / 'runs/tuned'}: " in found.not_searched[0]  # its prepared set is gone

    sha256 = run.sets[0].records[0].sha256
    by_hash = find_records(wanted(None, sha256, False), [run_dir])
    assert by_hash.runs[0].steps == run.steps and not by_hash.runs[0].held_out
    assert not find_records(wanted("Jane D[aeiou]e", None, False), [run_dir]).runs
    assert find_records(wanted("Jane D[aeiou]e", None, True), [run_dir]).runs

    answer = erase_records(wanted(SECRET, None, False), [tmp_path / "runs"], tmp_path / "new")
    lines = files[0].read_bytes().splitlines(keepends=True)
    assert Path(answer["files"][str(files[0])]).read_bytes() == b"".join(lines[:5] + lines[6:])
    assert set(answer["files"]) == {str(files[0]), str(files[2])}
    to_do = "\n".join(answer["what_to_do"])
    assert f"delete the export {tmp_path}/export_{STEPS}, and take it out of service" in to_do
    assert (
        f"moe-train train {run_dir}/config.yaml run_dir={run_dir}-erased 'data.train.0.files=[\"{tmp_path}/new/a.jsonl\"]'" in to_do
    )
    _, _, path, *overrides = shlex.split(re.findall("train again: (.*)", to_do)[0])
    retrained = yaml_file.load_config(path, overrides)
    assert retrained.run_dir == f"{run_dir}-erased" and retrained.data is not None
    assert [source.model_dump()["files"] for source in retrained.data.train] == [(f"{tmp_path}/new/a.jsonl",), (str(files[1]),)]
    assert f"{tmp_path}/runs/tuned started from {run_dir}: train it again" in to_do and "delete the prepared set" in to_do

    files[0].unlink()  # its tokens still hold the record
    by_tokens = find_records(wanted(SECRET, None, False), [run_dir])
    assert not by_tokens.not_searched
    (again,) = by_tokens.runs
    assert again.steps == run.steps and again.sets[0].records[0].location == f"{files[0]}:6 (found in its tokens)"
    shutil.rmtree(tmp_path / "cache")
    lost = find_records(wanted(SECRET, None, False), [run_dir])
    assert lost.not_searched == (f"{run_dir}: {files[0]}: gone or changed since, and its prepared set is gone",)


def test_what_cannot_be_looked_for_is_refused() -> None:
    for arguments in ((None, None, False), ("a", "b" * 64, False), (None, "123", False), (" ", None, False), ("(", None, True)):
        with pytest.raises(ValueError, match=r"PATTERN|--hash"):
            wanted(*arguments)

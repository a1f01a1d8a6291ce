"""`data prepare` and `data trace`: what a run learns from, made ahead, and found by the run, by the line and in a bucket."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train.cli import main
from moe_train.commands.prepare import trace
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.prepared import shard_pool
from moe_train.data.tokenizers.huggingface import HuggingFace

WORDS = "the quick brown fox jumps over the lazy dog and runs away".split()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Write the YAML of a run on two files, 6 and 40 records; `run(**data)` changes its data section."""
    for name, count in (("a", 6), ("b", 40)):
        lines = [json.dumps({"text": " ".join(WORDS[i % 5 :] * (1 + i % 3))}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(WORDS * 20, 300, tmp_path / "tokenizer")
    files = [{"name": "files", "files": [str(tmp_path / f"{name}.jsonl")], "record": {"name": "text"}} for name in "ab"]
    tree: dict[str, Any] = {
        "name": "small",
        "run_dir": str(tmp_path / "run"),
        "model": {
            **{"family": "mistral", "vocab_size": 320, "model_dim": 16, "num_layers": 1, "ffn": {"name": "dense", "ffn_dim": 16}},
            "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
        },
        "data": {"tokenizer": {"name": "huggingface", "path": str(tmp_path / "tokenizer")}, "cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 20, "batch_size": 4, "seq_len": 32},
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
    }
    tree["data"] |= {"train": [files[0] | {"weight": 1, "licence": "MIT"}, files[1] | {"weight": 3}], "eval": [files[0]]}

    def write(**data: Any) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps({**tree, "data": {**tree["data"], **data}}))  # JSON is YAML
        return path

    return write


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.raises(SystemExit) as left:
        main.main(["data", *arguments, "--json"])
    captured = capsys.readouterr()
    assert left.value.code == 0, captured.err
    return json.loads(captured.out)


def test_the_run_finds_what_was_prepared(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = answer(capsys, "prepare", str(run()))
    assert [(made["source"], made["records"]) for made in said["sets"]] == [
        ("data.train.0", 6), ("data.train.1", 40), ("data.eval.0", 6),
    ]  # fmt: skip
    tokenizer = HuggingFace(tmp_path / "tokenizer")
    ids = [tokenizer.encode(json.loads(line)["text"]) for line in (tmp_path / "b.jsonl").open()]
    assert said["sets"][1]["tokens"] == sum(map(len, ids)) + 2 * len(ids)
    a, b = (said["epochs"][str(tmp_path / f"{name}.jsonl")] for name in "ab")
    assert a > b > 0 and said["steps"] == 20
    monkeypatch.setattr(shard_pool, "write_shard", lambda *_: pytest.fail("tokenised again"))
    resolved = cli_config(run())
    loader = Loader(resolved.data, "train", tokenizer, BatchRows(4, 32), seed=0)
    assert loader.manifest_hash == said["manifest"] and loader.num_rows == said["rows_of_an_epoch"]
    assert json.loads(loader.manifest)["sets"][0]["licence"] == "MIT"
    assert answer(capsys, "prepare", str(run()))["manifest"] == said["manifest"]


def cli_config(path: Path) -> Any:
    from moe_train.config import yaml_file

    return yaml_file.load_config(path, ())


def test_from_a_folder_that_holds_the_sets(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "prepare", str(run()), "--to", f"file://{tmp_path}/there")
    assert all(made["path"].startswith(f"file://{tmp_path}/there/tokens-") for made in said["sets"])
    segments = answer(capsys, "trace", str(run()), "--step", "3")
    (tmp_path / "b.jsonl").unlink()
    sources = [{"name": "prepared", "path": made["path"], "weight": w} for made, w in zip(said["sets"], (1, 3), strict=False)]
    there = run(train=sources, eval=[])
    assert answer(capsys, "trace", str(there), "--step", "3") == segments
    assert answer(capsys, "prepare", str(there))["manifest"] == said["manifest"]


def test_a_row_is_traced_to_its_lines(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run()
    every = answer(capsys, "trace", str(path), "--step", "2")
    assert [segment for segment in every if segment["row"] == 1] == answer(capsys, "trace", str(path), "--step", "2", "--row", "1")
    assert {segment["row"] for segment in every} == {0, 1, 2, 3}
    tokenizer = HuggingFace(tmp_path / "tokenizer")
    batch = Loader(cli_config(path).data, "train", tokenizer, BatchRows(4, 32), seed=0).batch(1)  # of the second step
    for segment in every:
        text = json.loads(Path(segment["file"]).read_text().splitlines()[segment["number"] - 1])["text"]
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id][segment["start"] :][: segment["length"]]
        row = segment["row"]
        assert batch.tokens[row][batch.segment_ids[row] == segment["segment"]].tolist() == ids
    for wrong, said in (((0, None), "step 0: steps are counted from 1"), ((1, 4), "row 4: a step has 4 rows, counted from 0")):
        with pytest.raises(ValueError, match=f"^{said}$"):
            trace(cli_config(path), *wrong)


def test_a_config_without_data_is_told_so(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, said in (({"tokenizer": None}, "data.tokenizer is not stated; state it"), ({"train": []}, "data.train")):
        with pytest.raises(SystemExit) as left:
            main.main(["data", "prepare", str(run(**changes))])
        captured = capsys.readouterr()
        assert left.value.code == 2 and said in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "cache").exists()

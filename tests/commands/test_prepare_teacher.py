"""A teacher's predictions as a prepared set: what is stored, continued and refused, and a run that learns from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint.model_dir import open_model
from moe_train.commands import write_and_prove
from moe_train.commands.prepare import TeacherOptions, prepare
from moe_train.commands.prepare_teacher import check_same_vocabulary
from moe_train.commands.train import train
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.model.parameters import combine
from moe_train.run import loop
from moe_train.weights import texts
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model
from tests.run_dir import lines

DISTILLATION = {"name": "distillation", "top_k": 8}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
RECORDS = [{"prompt": f"say {n}", "completion": "quick " * n + "fox"} for n in range(1, 8)]


@pytest.fixture(scope="module")
def teacher(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with normal weights and the tokenizer of the student."""
    model = MIXTRAL.model_copy(update={"vocab_size": 288})
    options = write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(HuggingFace(text / "tokenizer")), depth="tensors")
    folder = tmp_path_factory.mktemp("teacher") / "model"
    with jax.set_mesh(ONE):
        write_and_prove.export_model(random_model(model)[1], model, folder, options)
    return folder


@pytest.fixture
def student(small_run: Callable[..., config.Config], tmp_path: Path) -> Callable[..., config.Config]:
    """A student of completions, whose rows hold the first 32 positions of each."""
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    record = {"name": "completion", "too_long": "truncate"}
    source = {"name": "files", "files": [str(tmp_path / "records.jsonl")], "record": record}

    def make(**changes: Any) -> config.Config:
        data = {"data__train": [source], "data__eval": [], "data__chat_template": TEMPLATE, "data__cache_dir": str(tmp_path / "c")}
        run_dir = changes.pop("run_dir", tmp_path / "run")
        return small_run(run_dir, **{"objective": DISTILLATION, **data, **changes})

    return make


def read(path: str) -> list[Any]:
    store = TokenStore(path)
    return store.read([ExampleSlice(i, 0, min(int(n), 32)) for i, n in enumerate(store.lengths())])


def logprobs_of(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities of all tokens at each position of one text."""
    opened = open_model(directory)
    with jax.set_mesh(opened.mesh):
        model = combine(*opened.load())
        padded = np.zeros((8, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = jax.jit(lambda x: model.logits(model(x)[0]))(padded)
        return np.asarray(jax.nn.log_softmax(jax.device_get(logits)[0, : len(tokens)]))


def test_what_is_stored_is_what_the_teacher_says(student: Any, teacher: Path, tmp_path: Path) -> None:
    """Also where the work is interrupted and continued, and from what a server wrote."""
    result = prepare(student(), teacher=TeacherOptions(teacher))
    [made] = result["sets"]
    assert made["top_k"] == 8 and 0 < made["kept_mass"] < 1 and 0 <= made["agreement"] <= 1
    pieces = read(made["path"])
    assert len(pieces) == len(RECORDS)
    for piece in pieces[:3]:
        trained = np.flatnonzero(piece.loss_mask[1:])
        assert len(piece.teacher.tail) == len(trained)
        logprobs = logprobs_of(teacher, piece.tokens[:-1])[trained]
        top = np.take_along_axis(logprobs, piece.teacher.ids, -1)
        np.testing.assert_allclose(top, -np.sort(-logprobs, -1)[:, :8], atol=1e-4)
        np.testing.assert_allclose(piece.teacher.logprobs, top, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(np.exp(piece.teacher.tail), 1 - np.exp(top).sum(-1), atol=1e-4)
    manifest = TokenStore(made["path"]).manifest
    assert manifest.teacher is not None and manifest.teacher.sha256 and manifest.sealed().hash == manifest.hash

    whole = Path(made["path"])
    before = {file.relative_to(whole): file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    unfinished = whole.with_suffix(".unfinished")
    whole.rename(unfinished)
    (unfinished / "manifest.json").unlink()
    [shard] = [path for path in unfinished.iterdir() if path.is_dir()]
    stored = np.fromfile(shard / "teacher_offsets", np.int64)
    stored[:3].tofile(shard / "teacher_offsets")  # two examples, and a part of the third
    (shard / "teacher_tail").write_bytes((shard / "teacher_tail").read_bytes()[: int(stored[2]) * 4 + 3])
    assert prepare(student(), teacher=TeacherOptions(teacher))["sets"][0]["path"] == str(whole)
    assert {file.relative_to(whole): file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before

    served = tmp_path / "served.jsonl"
    with served.open("w") as file:
        for piece in TokenStore(made["path"]).read([ExampleSlice(i, 0, int(n)) for i, n in enumerate(TokenStore(whole).lengths())]):
            logprobs = logprobs_of(teacher, piece.tokens[:32])
            entries: list[Any] = [None]
            for token, at in zip(piece.tokens[1:], logprobs, strict=False):
                chosen = {int(token), *np.argsort(-at)[:8].tolist()}
                entries.append({str(number): {"logprob": float(at[number])} for number in chosen})
            file.write(
                json.dumps({"prompt_logprobs": entries + [{str(int(t)): -1.0} for t in piece.tokens[len(entries) :]]}) + "\n"
            )
    [from_file] = prepare(student(), teacher=TeacherOptions(files=(served,)))["sets"]
    assert from_file["kept_mass"] == pytest.approx(made["kept_mass"], abs=1e-3)
    for piece, again in zip(pieces, read(from_file["path"]), strict=True):
        np.testing.assert_array_equal(piece.teacher.ids, again.teacher.ids)
        np.testing.assert_allclose(piece.teacher.logprobs, again.teacher.logprobs, atol=2e-3)
    served.write_text(served.read_text().replace("prompt_logprobs", "x", 1))
    with pytest.raises(ValueError, match=r"served.jsonl:1: there is no list prompt_logprobs"):
        prepare(student(), teacher=TeacherOptions(files=(served,)))


def test_a_student_learns_from_it(student: Any, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"records.jsonl has no predictions of a teacher; run moe-train data prepare"):
        train(student())
    [made] = prepare(student(), teacher=TeacherOptions(teacher, top_k=9))["sets"]
    source = {"name": "prepared", "path": made["path"]}
    changes = {"data__train": [source], "data__eval": [source], "train": {"steps": 12, "batch_size": 8, "seq_len": 32}}
    assert train(student(**changes)) == loop.FINISHED
    metrics = lines(tmp_path / "run")
    assert metrics[-1]["divergence"] < metrics[0]["divergence"]
    mass = lines(tmp_path / "run", "eval")[-1]["teacher_mass"]
    assert 8 / 9 * made["kept_mass"] <= mass < made["kept_mass"]  # of 8 tokens, and 9 are stored
    with pytest.raises(ValueError, match=r"at temperature 1, not objective.temperature 2"):
        train(student(**changes, run_dir=tmp_path / "b", objective={**DISTILLATION, "temperature": 2.0}))
    with pytest.raises(ValueError, match=r"holds 9 tokens of the teacher at each position, fewer than objective.top_k 10"):
        train(student(**changes, run_dir=tmp_path / "b", objective={"name": "distillation", "top_k": 10}))
    changes["train"]["seq_len"] = 64
    with pytest.raises(ValueError, match=r"in rows of 32, not of train.seq_len 64"):
        train(student(**changes, run_dir=tmp_path / "b"))


def test_what_is_refused(student: Any, teacher: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(ValueError, match=r"the config has next_token; set objective"):
        prepare(student(objective={"name": "next_token"}), teacher=TeacherOptions(teacher))
    with pytest.raises(ValueError, match=r"--top-k 4 stores fewer tokens than objective.top_k 8"):
        prepare(student(), teacher=TeacherOptions(teacher, top_k=4))
    with pytest.raises(ValueError, match=r"served log-probabilities have temperature 1"):
        objective = {**DISTILLATION, "temperature": 2.0}
        prepare(student(objective=objective), teacher=TeacherOptions(column="logprobs"))
    with pytest.raises(ValueError, match=r"records.jsonl:1: column logprobs should be a list"):
        prepare(student(), teacher=TeacherOptions(column="logprobs"))
    with pytest.raises(ValueError, match=r"records.jsonl:1: column completion is text that is not JSON"):
        prepare(student(), teacher=TeacherOptions(column="completion"))
    own = HuggingFace(text / "tokenizer")
    check_same_vocabulary(own, own, "teacher")
    other = tmp_path / "other"
    shutil.copytree(text / "tokenizer", other)
    tree = json.loads((other / "tokenizer.json").read_text())
    words = sorted(tree["model"]["vocab"].items(), key=lambda item: item[1])
    (a, i), (b, j) = words[-2:]
    tree["model"]["vocab"] |= {a: j, b: i}
    (other / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(
        ValueError, match=rf"the teacher T has another vocabulary: id {i} is .* for the student and .* for the teacher"
    ):
        check_same_vocabulary(own, HuggingFace(other), "T")

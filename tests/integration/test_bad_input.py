"""What a user can get wrong, through the command line: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.cli import main
from moe_train.commands import write_and_prove
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model

MODEL = """\
model:
  family: mixtral
  vocab_size: 300
  model_dim: 16
  num_layers: 1
  attention: {num_heads: 2, num_kv_heads: 2, head_dim: 8}
  ffn: {name: moe, ffn_dim: 32, num_experts: 4, experts_per_token: 2}
"""
RUN = """\
name: tiny
run_dir: run
data:
  tokenizer: {name: huggingface, path: tokenizer}
  train:
    - {name: files, files: [data.jsonl], record: {name: chat, too_long: drop}}
  cache_dir: cache
train: {steps: 2, batch_size: 8, seq_len: 32}
optimizer: {name: adamw, learning_rate: 1e-3}
loss: {load_balance_loss_coef: 0.01, router_z_loss_coef: 0}
mesh: {fsdp: 2, expert: 4}
checkpoint: {every_steps: 1}
metrics: {tensorboard: false}
"""
CHAT = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
FROM = ("model=null", "init_from=model")
LORA = 'lora.targets=[{"modules":["attention.*"],"rank":2,"alpha":4}]'


def write_records(*records: Any) -> None:
    Path("data.jsonl").write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Path, model: Path) -> Path:
    """A working directory with a config, data, a tokenizer and a model that go together."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN + MODEL)
    write_records(*[CHAT] * 16)
    copy(tokenizer, "tokenizer")
    copy(model, "model")
    return tmp_path


def copy(source: Path, target: str) -> None:
    Path(target).mkdir()
    for file in source.iterdir():
        Path(target, file.name).write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(["one two one two three"] * 100, 270, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml

    section = config.Model.model_validate_json(json.dumps(yaml.safe_load(MODEL)["model"]))
    path = tmp_path_factory.mktemp("model") / "model"
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=8))):
        _, weights = parameters(jax.jit(lambda: init_model(0, section, config.Compute()))())
        write_and_prove.export_model(weights, section, path, write_and_prove.WriteOptions(dtype="float32"))
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    return int(stop.value.code or 0)


def nothing() -> None:
    pass


def truncated() -> None:
    (file,) = Path("model").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def other_width() -> None:
    settings = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**settings, "hidden_size": 32}))


def one_tensor_less() -> None:
    Path("model/config.json").write_text(
        Path("model/config.json").read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )


@pytest.mark.parametrize(
    ("prepare", "overrides", "said"),
    [
        (nothing, ["data.train.0.files=[none.jsonl]"], "none.jsonl"),
        (nothing, ["data.tokenizer.path=none"], "none"),
        (nothing, ["data.tokenizer=null"], "data.tokenizer"),
        (nothing, ["data=null"], "data.train and data.tokenizer"),
        (nothing, ["mesh.fsdp=1"], "needs 4 devices, but 8 are available"),
        (nothing, ["mesh.fsdp=-1", "mesh.expert=3"], "mesh.expert 3 does not divide num_experts 4"),
        (nothing, ["model.vocab_size=264"], "vocab_size"),
        (nothing, ["train.seq_len=65536", "train.batch_size=8"], "train.seq_len 65536 exceeds the model's max_seq_len 32768"),
        (nothing, ["train.microbatchs=2"], "unknown key; did you mean microbatches?"),
        (nothing, ['optimizer.schedule={"name":"cosine","warmup_steps":5}'], "warmup_steps 5"),
        (nothing, [LORA], "lora needs init_from"),
        (nothing, ["model=null", "init_from=none"], "none: no such folder"),
        (nothing, [*FROM, LORA.replace("attention", "attn")], "pattern 'attn.*' names no module; there are attention.k_proj"),
        (nothing, ["init_from=model", "model.num_layers=2"], "model.num_layers is 2, but 1 in init_from model; leave model out"),
        (nothing, [*FROM, "mesh.fsdp=1", "mesh.tensor=4", "mesh.expert=2"], "mesh.tensor 4 does not divide num_kv_heads 2"),
        (truncated, [*FROM], ".safetensors is truncated"),
        (other_width, [*FROM], "(16,) instead of (32,)"),
        (one_tensor_less, [*FROM], "model.layers.1."),
        (lambda: Path("model/config.json").write_text("{"), [*FROM], "model/config.json"),
        (lambda: Path("tokenizer/tokenizer.json").write_text("{}"), [], "tokenizer/tokenizer.json"),
        (lambda: write_records(CHAT, "{oops\n"), [], "data.jsonl:2: "),
        (lambda: write_records(CHAT, {"text": "plain"}), [], "data.jsonl:2: the record is of the kind text"),
        (lambda: write_records(CHAT, {"messages": CHAT["messages"][:1]}), [], "data.jsonl:2: "),
        (lambda: write_records(CHAT, {"messages": [{"role": "wizard", "content": "x"}]}), [], "data.jsonl:2: "),
        (lambda: write_records({**CHAT, "tools": [{"type": "function"}]}), [], "data.jsonl:1: tool 0 is"),
        (lambda: write_records(), [], "data.jsonl"),
    ],
)
def test_training_is_refused(prepare: Callable[[], Any], overrides: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    prepare()
    refused("run.yaml", *overrides, said=said, capsys=capsys)
    assert not Path("run").exists()


def without_progress(err: str) -> str:
    """What was said but for what it was doing: reading the data takes a while, and says so."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("tokenizing"))


def refused(*arguments: str, said: str, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert run("train", *arguments) == 2
    err = without_progress(capsys.readouterr().err)
    assert said in err
    assert err.startswith("moe-train: ") and err.count("\n") == 1, err
    assert len(err) < 600, err


def test_a_run_is_not_continued_as_another(capsys: pytest.CaptureFixture) -> None:
    assert run("train", "run.yaml") == 0
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    assert [file for file in before if "checkpoints" in file.parts]
    refused(
        "run.yaml",
        "train.steps=3",
        "model.ffn.ffn_dim=64",
        said="model.ffn.ffn_dim is 64, but the run in run was started with 32",
        capsys=capsys,
    )
    refused("run.yaml", "train.steps=3", "seed=1", said="seed is 1, but the run in run was started with 0", capsys=capsys)
    write_records(CHAT)
    refused("run.yaml", "train.steps=3", said="the training data have changed since the run in run was started", capsys=capsys)
    assert {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("list.json", '[{"prompt": "one"}]', "list.json: row 1: no column is one of text, messages,"),
        ("number.jsonl", "3\n", "number.jsonl:1: a record should be an object"),
        ("broken.jsonl", '\n{"text"\n', "broken.jsonl:2: not JSON"),
        ("empty.jsonl", "", "empty.jsonl: no record with any text"),
        ("binary.jsonl", "\udcff", "binary.jsonl:1: not UTF-8"),
        ("run.toml", "", "run.toml: no format goes with its name"),
    ],
)
def test_evaluation_is_refused(name: str, text: str, said: str, capsys: pytest.CaptureFixture) -> None:
    for file in Path("tokenizer").iterdir():
        Path("model", file.name).write_bytes(file.read_bytes())
    Path(name).write_text(text, errors="surrogateescape")
    assert run("evaluate", "model", "--data", name) == 2
    err = without_progress(capsys.readouterr().err)
    assert said in err and err.startswith("moe-train: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("wrap", ["{}", "[{}]"])
def test_the_first_record_says_how_a_file_is_evaluated(wrap: str, capsys: pytest.CaptureFixture) -> None:
    for file in Path("tokenizer").iterdir():
        Path("model", file.name).write_bytes(file.read_bytes())
    Path("chat.json").write_text(wrap.replace("{}", json.dumps(CHAT)))
    assert run("evaluate", "model", "--data", "chat.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss_tokens"] < 10  # the assistant's alone

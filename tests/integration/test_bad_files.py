"""Files that are damaged or lie, through the command line: one clear line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.cli import main
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.weights import gguf, hf, mistral, peft
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora

MODEL = config.Model(
    family="mixtral",
    vocab_size=280,
    model_dim=32,
    num_layers=1,
    attention=config.GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=16),
    ffn=config.MoeFfn(name="moe", ffn_dim=32, num_experts=2, experts_per_token=1),
)
OTHER = MODEL.model_copy(update={"num_layers": 2})
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*_proj"), rank=2, alpha=4.0),))
NORM = "model.norm.weight"


def write_models(folder: Path, tokenizer: Path) -> None:
    def half(piece: Any, dtype: Any = "float32") -> np.ndarray:
        return np.full(piece.shape, 0.5, dtype)

    for name, layout in (("hf", hf), ("mistral", mistral)):
        (folder / name).mkdir()
        layout.write(folder / name, MODEL, "float32", half)  # type: ignore[attr-defined]
    (folder / "gguf").mkdir()
    gguf.write(folder / "gguf", MODEL, "f32", lambda piece, dtype: np.full(piece.part_shape, 0.5, dtype))
    for name in ("hf", "mistral", "gguf"):
        for file in tokenizer.iterdir():
            shutil.copy(file, folder / name)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, mistral/ and gguf/ with a model each; of_peft/, of_mistral/ and of_gguf/ with adapters of a model with more layers."""
    folder = tmp_path_factory.mktemp("good")
    train_tokenizer(["one two three"] * 9, 262, folder / "tokenizer")
    write_models(folder, folder / "tokenizer")
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        weights = parameters(init_model(0, OTHER, config.Compute(), LORA))[1]
        peft.export_adapter(weights, OTHER, LORA, folder / "of_peft", base_model="base")
        mistral_lora.export_adapter(weights, OTHER, LORA, folder / "of_mistral", dtype="float32")
        gguf_lora.export_adapter(weights, OTHER, LORA, folder / "of_gguf", base_model="base")
    return folder


@pytest.fixture
def here(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], said: str, *arguments: str) -> None:
    before = {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.startswith("moe-train: ") and err.count("\n") == 1 and len(err) < 600, err
    assert said in err, err
    assert before == {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


# --- safetensors: headers ------------------------------------------------------------------------------------------


def shard() -> Path:
    (file,) = Path("hf").glob("*.safetensors")
    return file


def rewrite(change: Callable[[dict[str, Any]], Any], data: Callable[[bytes], bytes] = bytes) -> None:
    """Change the header, as JSON, or what lies behind it."""
    whole = shard().read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard().write_bytes(len(text).to_bytes(8, "little") + text + data(whole[8 + length :]))


def overlapping(header: dict[str, Any]) -> None:
    start, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [start - 16, end - 16]


def a_hole(header: dict[str, Any]) -> None:
    for info in header.values():
        if "data_offsets" in info and info["data_offsets"][0] >= header[NORM]["data_offsets"][0]:
            info["data_offsets"] = [x + 8 for x in info["data_offsets"]]


def duplicate() -> None:
    whole = shard().read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    text = whole[8 : 8 + length].rstrip()[:-1] + f',"{NORM}":{json.dumps(header[NORM])}}}'.encode()
    shard().write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


SAFETENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "overlapping": (lambda: rewrite(overlapping), "is truncated or not a safetensors file"),
    "a hole between two": (lambda: rewrite(a_hole, lambda data: data + bytes(8)), "is truncated or not a safetensors file"),
    "truncated data": (lambda: rewrite(dict, lambda data: data[:-4]), "is truncated"),
    "truncated header": (lambda: shard().write_bytes(shard().read_bytes()[:100]), "is truncated"),
    "of no length": (lambda: shard().write_bytes(b""), "is truncated"),
    "more data than it says": (lambda: rewrite(dict, lambda data: data + bytes(64)), "is truncated or not a safetensors file"),
    "an oversized header": (lambda: shard().write_bytes(struct.pack("<Q", 2**62) + shard().read_bytes()[8:]), "is truncated"),
    "a header of 100 MB": (lambda: shard().write_bytes(struct.pack("<Q", 10**8 + 1) + shard().read_bytes()[8:]), "is truncated"),
    "a tensor of 2**60 bytes": (
        lambda: rewrite(lambda header: header[NORM].update(shape=[2**58], data_offsets=[0, 2**60])),
        "is truncated or not a safetensors file",
    ),
    "a duplicate key": (duplicate, f"the header has {NORM} twice"),
    "another dtype of one size": (lambda: rewrite(lambda header: header[NORM].update(dtype="I32")), f"{NORM} has dtype I32"),
    "a dtype of another size": (lambda: rewrite(lambda header: header[NORM].update(dtype="F16")), "is truncated or not"),
    "an unknown dtype": (lambda: rewrite(lambda header: header[NORM].update(dtype="Q4")), "is truncated or not a safetensors file"),
    "another shape of the same size": (
        lambda: rewrite(lambda header: header[NORM].update(shape=[4, 8])),
        f"has {NORM} of shape (4, 8) instead of (32,)",
    ),
    "a header that is no JSON": (
        lambda: shard().write_bytes(struct.pack("<Q", 8) + b"{oops...." + bytes(64)),
        "is truncated or not a safetensors file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_headers(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = SAFETENSORS[name]
    change()
    refused(capsys, said, "export", "hf", "out")


def index(change: Callable[[dict[str, str]], Any]) -> None:
    file = Path("hf/model.safetensors.index.json")
    content = json.loads(file.read_text())
    change(content["weight_map"])
    file.write_text(json.dumps(content))


INDEX: dict[str, tuple[Callable[[], Any], str]] = {
    "a foreign path": (
        lambda: index(lambda files: files.update({NORM: "../elsewhere.safetensors"})),
        "names the file '../elsewhere.",
    ),
    "an absolute path": (
        lambda: index(lambda files: files.update({NORM: "/etc/passwd"})),
        "names the file '/etc/passwd'; shards must be plain",
    ),
    "a file that is missing": (lambda: index(lambda files: files.update({NORM: "model-9.safetensors"})), "disagree about|missing"),
    "a name too many": (lambda: index(lambda files: files.update({"more": shard().name})), "disagree about more (1 tensors"),
    "a name too few": (lambda: index(lambda files: files.pop(NORM)), f"disagree about {NORM}"),
    "no JSON": (lambda: Path("hf/model.safetensors.index.json").write_text("{"), "is not an index of safetensors files"),
    "no map": (lambda: Path("hf/model.safetensors.index.json").write_text("[]"), "is not an index of safetensors files"),
}


@pytest.mark.parametrize("name", INDEX)
def test_index_files(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = INDEX[name]
    change()
    refused(capsys, said.split("|")[0], "export", "hf", "out")


# --- GGUF ----------------------------------------------------------------------------------------------------------


def patch(offset: int, code: str, value: int) -> None:
    file = Path("gguf/model.gguf")
    content = bytearray(file.read_bytes())
    struct.pack_into(code, content, offset, value)
    file.write_bytes(content)


def cut(size: int) -> None:
    Path("gguf/model.gguf").write_bytes(Path("gguf/model.gguf").read_bytes()[:size])


GGUF: dict[str, tuple[Callable[[], Any], str]] = {
    "2**63 tensors": (lambda: patch(8, "<Q", 2**63), "9,223,372,036,854,775,808 tensors"),
    "a tensor more than there is": (lambda: patch(8, "<Q", 16), "model.gguf"),
    "2**63 keys": (lambda: patch(16, "<Q", 2**63), "9,223,372,036,854,775,808 keys"),
    "a key more than there is": (lambda: patch(16, "<Q", 40), "model.gguf"),
    "a key of 2**62 letters": (lambda: patch(24, "<Q", 2**62), "bytes for a key"),
    "another magic": (lambda: patch(0, "<I", 7), "is not a GGUF file"),
    "version 9": (lambda: patch(4, "<I", 9), "has GGUF version 9"),
    "cut in the header": (lambda: cut(500), "model.gguf is truncated"),
    "cut in the data": (lambda: cut(-64), "model.gguf is truncated"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_files(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = GGUF[name]
    change()
    refused(capsys, said, "export", "gguf", "out")


# --- adapters, and templates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["of_peft", "of_mistral", "of_gguf"])
def test_adapters_of_another_base(adapter: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, adapter, "adapters", "merge", "hf", adapter, "out")
    Path("run.yaml").write_text(
        f"name: x\nrun_dir: run\ninit_from: hf\nlora: {{init_from: {adapter}}}\n"
        "data: {train: [{name: files, files: [data.jsonl], record: {name: text}}]}\n"
        "train: {steps: 1, batch_size: 8, seq_len: 16}\noptimizer: {name: adamw, learning_rate: 1e-3}\nmesh: {fsdp: 8}\n"
        "loss: {load_balance_loss_coef: 0, router_z_loss_coef: 0}\n"
    )
    Path("data.jsonl").write_text('{"text": "one two three"}\n' * 9)
    refused(capsys, adapter, "train", "run.yaml")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("of_peft", name)
    file.write_bytes(file.read_bytes()[:-30])
    refused(capsys, name, "adapters", "merge", "hf", "of_peft", "out")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__name__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch escaped').read() }}",
    "{{ self._TemplateReference__context.eval_ctx.environment }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10**12) %}x{% endfor %}",
    "{{ 'x' * 10**12 }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_that_try_to_leave_the_sandbox(template: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole model with such a template is looked at, and trained from."""
    Path("template.jinja").write_text(template)
    Path("chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    )
    arguments = ("data", "show", "chat.jsonl", "--tokenizer", "tokenizer", "--chat-template", "template.jinja")
    refused(capsys, "template", *arguments)

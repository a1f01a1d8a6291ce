"""GGUF without llama.cpp: files there and back, the package `gguf` as an independent reader and writer, tokenizers, chat
formats, and files that are damaged or lie."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as package
import jax
import mistral_common
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.commands.train_tokenizer import train_bpe
from moe_train.data.chat import sandbox
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.machine.mesh import make_mesh
from moe_train.weights import external, external_adapter, gguf, merge, names
from moe_train.weights.arrays import fetch
from moe_train.weights.gguf import chat_format, container
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.gguf import settings as gguf_settings
from moe_train.weights.gguf import tokenizer as gguf_tokenizer
from tests.random_parameters import random_parameters

SIZES: dict[str, Any] = {"vocab_size": 352, "model_dim": 64, "num_layers": 2, "max_seq_len": 128}
ATTENTION = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=24)
DENSE = config.DenseFfn(name="dense", ffn_dim=96)
MOE = config.MoeFfn(name="moe", ffn_dim=96, num_experts=4, experts_per_token=2)
YARN = config.YarnRope(name="yarn", theta=1e4, factor=16.0, original_max_seq_len=8, mscale=1.0, mscale_all_dim=1.0)
SCALED = ATTENTION.model_copy(update={"query_scaling": config.QueryScaling(beta=0.1, original_max_seq_len=8)})
MIXTRAL = config.Model(family="mixtral", attention=ATTENTION, ffn=MOE, **SIZES)
MINISTRAL3 = config.Model(family="ministral3", attention=SCALED, ffn=DENSE, rope=YARN, tie_embeddings=True, **SIZES)
WINDOWS = ATTENTION.model_copy(update={"windows": (None, 48)})
MINISTRAL = config.Model(family="ministral", attention=WINDOWS, ffn=DENSE, **SIZES)
MISTRAL = config.Model(family="mistral", attention=ATTENTION, ffn=DENSE, **SIZES)
ONE = make_mesh(config.Mesh(), jax.devices()[:1])
EIGHT = make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2))
LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.[qk]_proj",), rank=2, alpha=3.0),
        config.LoraTarget(modules=("ffn.*_proj",), rank=3, alpha=6.0),
    )
)
COMMON = Path(mistral_common.__file__).parent / "data"


def shapes(parameters: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for path, a in parameters.items()}


def write(
    directory: Path, model: config.Model, parameters: dict[str, jax.Array], dtype: str = "f32", tokenizer: Any = None
) -> Path:
    def matrix(piece: names.Piece, dtype: np.dtype) -> np.ndarray:
        return piece.to_file(merge.merged(parameters, None, piece, dtype))

    directory.mkdir(exist_ok=True)
    gguf.write(directory, model, dtype, matrix, tokenizer)
    return directory / gguf.FILE


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return train_bpe([Path(__file__).read_text()], 330, tmp_path_factory.mktemp("bpe") / "tokenizer")


# --- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL3, MINISTRAL], ids=lambda model: model.family)
def test_a_file_is_read_back_bit_for_bit_on_any_mesh(model: config.Model, dtype: Any, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        sharded = random_parameters(model, dtype=dtype)
        file = write(tmp_path, model, sharded, dtype)
        assert external.layout_of(file) == external.layout_of(tmp_path) == "gguf"
        assert external.read_model(tmp_path) == model
        found = external.load_parameters(file, shapes(sharded))
    for path, array in sharded.items():
        assert found[path].sharding == array.sharding
        assert np.array_equal(np.asarray(found[path]), np.asarray(array)), path


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_package_gguf_reads_what_is_written(dtype: str, tmp_path: Path, tokenizer: HuggingFace) -> None:
    model = MIXTRAL.model_copy(update={"ffn": MOE.model_copy(update={"ffn_dim": 80})})  # rows of 80 are no blocks of 32
    with jax.set_mesh(ONE):
        parameters = random_parameters(model)
        reader = package.GGUFReader(write(tmp_path, model, parameters, dtype, tokenizer))
    assert reader.get_field("llama.expert_count").contents() == 4
    assert reader.get_field("tokenizer.ggml.tokens").contents()[:3] == ["<pad>", "<s>", "</s>"]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types["blk.1.attn_norm.weight"], types["blk.0.ffn_gate_inp.weight"]} == {"F32"}
    assert types["token_embd.weight"] == dtype.upper()
    assert types["blk.0.ffn_down_exps.weight"] == {"q8_0": "F16"}.get(dtype, dtype.upper())
    found = {tensor.name: package.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    table = names.pieces(model, names.GGUF)
    assert {piece.name for piece in table} == set(found)
    ours = container.open_file(tmp_path / gguf.FILE).tensors
    for piece in table:
        theirs = found[piece.name].reshape(piece.shape)[piece.part]
        assert np.array_equal(theirs, ours[piece.name].read(piece.part).astype(np.float32))
        wanted = piece.to_file(fetch(parameters[piece.path], piece.lead)).astype(np.float32)
        size, kind = np.abs(wanted), types[piece.name]
        unit = size * {"F32": 0, "F16": 2**-11, "BF16": 2**-8}.get(kind, 0) + (2**-25 if kind == "F16" else 0)
        if kind == "Q8_0":  # half a step of the block, and the rounding of the step itself
            unit = size.reshape(-1, 32).max(1, keepdims=True).repeat(32, 1).reshape(size.shape) * (0.5 / 127 + 2**-10)
        assert np.all(np.abs(theirs - wanted) <= unit), piece.name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16"])
def test_parts_of_quantised_tensors_are_read_alone(kind: str, tmp_path: Path) -> None:
    encoding = package.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(3, 8, 64)).astype(np.float32)
    stored = package.quantize(values, encoding)
    writer = package.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=encoding)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    tensor = container.open_file(tmp_path / "x.gguf").tensors["x"]
    whole = package.dequantize(stored, encoding)
    assert tensor.shape == (3, 8, 64)
    for index in ((), (1,), (slice(1, 3),), (2, slice(3, 5)), (0, slice(0, 8), slice(5, 40)), (slice(0, 2), 7, slice(33, 34))):
        assert np.array_equal(tensor.read(index).astype(np.float32), whole[index]), index


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL3, MISTRAL], ids=lambda model: model.family)
def test_other_tools_files_are_read(model: config.Model, per_expert: bool, tmp_path: Path) -> None:
    """Without our key; and with a tensor an expert, as files of Mixtral were at first."""
    if per_expert and model is not MIXTRAL:
        return
    with jax.set_mesh(ONE):
        parameters = random_parameters(model)
        opened = container.open_file(write(tmp_path, model, parameters))
        arrays = {name: tensor.read() for name, tensor in opened.tensors.items()}
        if per_expert:
            for name in [name for name in arrays if "_exps" in name]:
                arrays |= {name.replace("_exps", f".{e}"): expert for e, expert in enumerate(arrays.pop(name))}
        file = tmp_path / "theirs.gguf"
        rewrite(file, {k: v for k, v in opened.settings.items() if k != gguf_settings.OURS}, arrays)
        found = external.load_parameters(file, shapes(parameters))
    assert external.read_model(file) == model
    assert all(np.array_equal(np.asarray(found[path]), np.asarray(array)) for path, array in parameters.items())


def rewrite(file: Path, keys: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    typed = {k: np.uint32(v) if type(v) is int else np.float32(v) if type(v) is float else np.bool_(v) if type(v) is bool else v
             for k, v in keys.items()}  # fmt: skip
    specs = [container.Spec(name, array.shape, "F32") for name, array in arrays.items()]
    container.write_file(file, typed, specs, lambda spec: [arrays[spec.name]])


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
    "an adapter": ({"general.type": "adapter"}, "general.type is 'adapter'"),
    "a part": ({"split.count": 2}, "one of 2 parts"),
    "values of another length": ({"llama.attention.value_length": 32}, "attention.value_length is 32"),
    "half of the head turns": ({"llama.rope.dimension_count": 12}, "rope.dimension_count is 12"),
    "linear scaling": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "rope.scaling is linear by 4"),
    "yarn under llama": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "cannot have a yarn rope"),
    "layers that differ": ({"llama.feed_forward_length": np.array([96, 48], np.uint32)}, "differs between layers"),
    "no layers": ({"llama.block_count": None}, "llama.block_count is missing"),
    "more layers than there are": ({"llama.block_count": 3}, "lacks blk.2.attn_norm.weight"),
    "fewer layers": ({"llama.block_count": 1}, "has blk.1.attn_norm.weight"),
    "text for a number": ({"llama.block_count": "two"}, "num_layers"),
    "negative": ({"llama.context_length": np.int32(-1)}, "max_seq_len"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_built_is_refused(name: str, tmp_path: Path) -> None:
    changes, said = CHANGES[name]
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL)
        opened = container.open_file(write(tmp_path, MISTRAL, parameters))
        keys = {k: v for k, v in ({**opened.settings, **changes}).items() if k != gguf_settings.OURS and v is not None}
        rewrite(tmp_path / "x.gguf", keys, {name: tensor.read() for name, tensor in opened.tensors.items()})
        with pytest.raises(ValueError, match=said) as error:
            external.load_parameters(tmp_path / "x.gguf", shapes(parameters))
    assert "\n" not in str(error.value) and "x.gguf" in str(error.value)


def test_changed_frequencies_and_changed_keys_are_refused(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        opened = container.open_file(write(tmp_path, MISTRAL, random_parameters(MISTRAL)))
    arrays = {"rope_freqs.weight": np.full(12, 2, np.float32), "token_embd.weight": opened.tensors["token_embd.weight"].read()}
    rewrite(tmp_path / "x.gguf", {k: v for k, v in opened.settings.items() if k != gguf_settings.OURS}, arrays)
    with pytest.raises(ValueError, match=r"rope_freqs.weight changes the rotary frequencies"):
        gguf.read_model(tmp_path / "x.gguf")
    rewrite(tmp_path / "x.gguf", opened.settings | {"llama.rope.freq_base": 5e5}, {})
    with pytest.raises(ValueError, match=r"llama.rope.freq_base is 500000.0, but 1000000.0 by moe_train.model"):
        gguf.read_model(tmp_path / "x.gguf")


def test_a_window_becomes_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with jax.set_mesh(ONE):
        file = write(tmp_path, MINISTRAL, random_parameters(MINISTRAL))
    assert container.open_file(file).settings["llama.context_length"] == 48
    assert "a context of 48 tokens, up to which it is exact" in caplog.text


def test_a_scale_that_llama_cpp_has_no_words_for_is_refused() -> None:
    model = MINISTRAL3.model_copy(update={"rope": YARN.model_copy(update={"mscale": 0.5})})
    with pytest.raises(ValueError, match=r"rope.mscale is 0.5; llama.cpp takes it for 1"):
        gguf_settings.settings(model)


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL)
        parameters["embed.weight"] = jax.device_put(np.full((352, 64), 1e5, np.float32), parameters["embed.weight"].sharding)
        with np.errstate(over="ignore"), pytest.raises(ValueError, match=r"token_embd.weight has numbers beyond float16"):
            write(tmp_path, MISTRAL, parameters, "f16")


def test_k_quants_are_llama_cpps_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / gguf.QUANTIZE
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL)
        with pytest.raises(ValueError, match=r"dtype q4_k_m .* llama-quantize is not on PATH; install llama.cpp"):
            write(tmp_path / "a", MISTRAL, parameters, "q4_k_m")
        tool.parent.mkdir()
        tool.write_text('#!/bin/sh\ncp "$1" "$2"\necho "$3" > "$2.kind"\n')
        tool.chmod(0o755)
        file = write(tmp_path / "b", MISTRAL, parameters, "q4_k_m")
        assert (tmp_path / "b" / "model.gguf.kind").read_text() == "Q4_K_M\n"
        assert sorted(path.name for path in file.parent.iterdir()) == ["Modelfile", "model.gguf", "model.gguf.kind"]
        assert container.open_file(file).tensors["token_embd.weight"].encoding.name == "BF16"
        tool.write_text('#!/bin/sh\necho "no such type $3" >&2\nexit 1\n')
        with pytest.raises(ValueError, match=r"could not make q9_x \(exit code 1\); it said: no such type Q9_X"):
            write(tmp_path / "c", MISTRAL, parameters, "q9_x")


def test_an_adapter_alone(tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(MIXTRAL, lora=LORA)
        gguf_lora.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", base_model="base")
    reader = package.GGUFReader(tmp_path / "out" / gguf_lora.FILE)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == 2 * 2 * 5
    assert found["blk.1.ffn_up_exps.weight.lora_a"].shape == (4, 3, 64)
    for module, rank, scale in (("gate", 3, 2.0), ("down", 3, 2.0)):
        a, b = (found[f"blk.1.ffn_{module}_exps.weight.lora_{x}"][2].astype(np.float64) for x in "ab")
        ours = [np.asarray(parameters[f"stacks.0.layers.0.ffn.{module}_proj.lora_{x}"])[1, 2].astype(np.float64) for x in "ab"]
        np.testing.assert_allclose(alpha / rank * b @ a, scale * (ours[0] @ ours[1]).T, rtol=1e-5, atol=1e-7)
    a, b = (found[f"blk.0.attn_q.weight.lora_{x}"].astype(np.float64) for x in "ab")
    q_a, q_b = (np.asarray(parameters[f"stacks.0.layers.0.attention.q_proj.lora_{x}"])[0].astype(np.float64) for x in "ab")
    pairs = q_b.reshape(2, 4, 2, 12).swapaxes(2, 3).reshape(2, 96)  # halves of a head -> pairs side by side
    np.testing.assert_allclose(alpha / 2 * b @ a, 1.5 * (q_a @ pairs).T, rtol=1e-5, atol=1e-7)


def test_an_adapter_is_read_back_on_any_mesh(tmp_path: Path) -> None:
    """With one scale for all, bit for bit; llama.cpp's own converter writes half precision, and no keys of ours."""
    lora = config.Lora(
        targets=(
            config.LoraTarget(modules=("attention.*",), rank=2, alpha=3.0),
            config.LoraTarget(modules=("ffn.*_proj", "ffn.router", "head"), rank=3, alpha=3.0),
        )
    )
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(MIXTRAL, lora=lora)
        gguf_lora.export_adapter(parameters, MIXTRAL, lora, tmp_path / "out", base_model="base")
    with jax.set_mesh(ONE):
        found = external_adapter.read_lora(tmp_path / "out", MIXTRAL)
        assert {target.rank: target.alpha for target in found.targets} == {2: 3.0, 3: 3.0}
        wanted = {path: x for path, x in random_parameters(MIXTRAL, lora=found).items() if ".lora_" in path}
        for source in (tmp_path / "out", tmp_path / "out" / gguf_lora.FILE):
            loaded = external_adapter.load_adapter(source, MIXTRAL, shapes(wanted))
            assert loaded.keys() == {path for path in parameters if ".lora_" in path}
            assert all(np.array_equal(np.asarray(x), np.asarray(parameters[path])) for path, x in loaded.items())
    assert len(external_adapter.hashes(tmp_path / "out")) == 2 * (2 * 8 + 1) + 1
    with pytest.raises(ValueError, match=r"is for another base: general.architecture is 'llama', not 'mistral3'"):
        external_adapter.read_lora(tmp_path / "out", MINISTRAL3)
    with pytest.raises(ValueError, match=r"has blk.0.ffn_down_exps.weight.lora_a, which is no adapter of this model"):
        external_adapter.read_lora(tmp_path / "out", MISTRAL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter.lora.alpha": np.float32(-1)}, "adapter.lora.alpha is -1.0; it has to be a number"),
        ({"adapter.lora.alpha": "much"}, "adapter.lora.alpha is 'much'; it has to be a number"),
        ({"adapter.type": "ia3"}, "is no adapter: adapter.type is 'ia3'"),
        ({"general.type": "model"}, "is no adapter: general.type is 'model'"),
    ],
)
def test_a_file_that_is_no_adapter_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    keys |= {"adapter.lora.alpha": np.float32(0), **change}
    ranks = {"blk.0.attn_q": 2, "blk.1.attn_q": 2}

    def write_adapter(ranks: dict[str, int]) -> None:
        specs = [container.Spec(f"{name}.weight.lora_a", (rank, 64), "F32") for name, rank in ranks.items()]
        specs += [container.Spec(f"{name}.weight.lora_b", (96, rank), "F32") for name, rank in ranks.items()]
        container.write_file(tmp_path / "x.gguf", keys, specs, lambda spec: [np.zeros(spec.shape, np.float32)])

    write_adapter(ranks)
    with pytest.raises(ValueError, match=said):
        external_adapter.read_lora(tmp_path, MISTRAL)
    keys |= {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": np.float32(0)}
    write_adapter(ranks)
    (target,) = external_adapter.read_lora(tmp_path, MISTRAL).targets
    assert (target.rank, target.alpha, target.modules) == (2, 2.0, ("attention.q_proj",))  # 0 stands for a scale of 1
    for others in ({"blk.0.attn_q": 2}, {**ranks, "blk.1.attn_q": 3}):
        write_adapter(others)
        with pytest.raises(ValueError, match=r"blk.0.attn_q.weight.lora_a has rank 2, blk.1.attn_q.weight.lora_a another"):
            external_adapter.read_lora(tmp_path, MISTRAL)


# --- tokenizers ----------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], HuggingFace]:
    def convert(tokenizer: Any) -> HuggingFace:
        found = gguf_tokenizer.settings(tokenizer, tokenizer.vocab_size + 3, tokenizer.chat_template)
        directory = tmp_path_factory.mktemp("there")
        gguf_tokenizer.extract(gguf_tokenizer.keys(found), directory, "file.gguf")
        back = HuggingFace(directory)
        assert (back.bos_id, back.eos_id, back.chat_template) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template)
        again = gguf_tokenizer.settings(back, tokenizer.vocab_size + 3, back.chat_template)
        for key, value in found.items():  # and what was read writes the same file
            if not (key.endswith("scores") or key.endswith("merges")):
                assert np.array_equal(again[key], value), key
        return back

    return convert


@pytest.mark.parametrize("which", ["bpe", "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "tekken_240911.json"])
def test_a_tokenizer_comes_back_out_of_the_file(which: str, tokenizer: HuggingFace, there_and_back: Any) -> None:
    ours = tokenizer if which == "bpe" else Mistral(COMMON / which)
    back = there_and_back(ours)

    @given(text)
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def same(text: str) -> None:
        assert back.encode(text) == ours.encode(text)

    same()
    assert back.decode(ours.encode("Olá,  wörld 123\n\tok")).strip() == "Olá,  wörld 123\n\tok"


CONVERSATION = [
    *({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}),
    *({"role": "assistant", "content": "Because."}, {"role": "user", "content": "And now?"}),
]


@pytest.mark.parametrize("name", chat_format.FORMATS)
def test_jinja_spells_a_format_and_is_recognised(name: str) -> None:
    chat = chat_format.FORMATS[name]
    template = chat_format.jinja(chat)
    variables = {"messages": CONVERSATION, "add_generation_prompt": True, "bos_token": "<s>"}
    assert sandbox.render(template, [variables]) == ["<s>" + chat_format.spelled(chat, CONVERSATION, ask=True)]


def test_the_quickstarts_format_is_recognised(tokenizer: HuggingFace) -> None:
    assert tokenizer.chat_template is not None
    assert chat_format.recognised(tokenizer.chat_template, tokenizer) == chat_format.FORMATS["mistral v1 to v3, system first"]
    for name, chat in chat_format.FORMATS.items():
        assert chat_format.recognised(chat_format.jinja(chat), tokenizer) == chat, name
    assert chat_format.recognised(tokenizer.chat_template.replace("[INST]", "[Q]"), tokenizer) is None
    assert chat_format.recognised("{{ raise_exception('no') }}", tokenizer) is None


def test_the_modelfile(tmp_path: Path, tokenizer: HuggingFace) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL)
        write(tmp_path, MISTRAL, parameters, tokenizer=tokenizer)
        modelfile = (tmp_path / "Modelfile").read_text()
        assert modelfile.startswith('FROM ./model.gguf\nTEMPLATE """{{ $first := true }}{{ range $i, $_ := .Messages }}')
        assert modelfile.endswith('PARAMETER stop "</s>"\nPARAMETER stop "[INST]"\n')
        write(tmp_path, MISTRAL, parameters)
        assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()


def test_a_folder_with_one_file_is_a_model(tmp_path: Path, tokenizer: HuggingFace) -> None:
    with jax.set_mesh(ONE):
        file = write(tmp_path, MISTRAL, random_parameters(MISTRAL), tokenizer=tokenizer)
    opened = model_dir.open_model(tmp_path)
    assert opened.model == MISTRAL and opened.chat_template == tokenizer.chat_template
    assert opened.tokenizer.encode("What, ünder?") == tokenizer.encode("What, ünder?")
    assert model_dir.find_tokenizer(file) == model_dir.find_tokenizer(tmp_path)
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"one \.gguf file"):
        model_dir.open_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["model"].update(ignore_merges=True), "has ignore_merges True, llama.cpp's gpt-2 the opposite"),
        (lambda d: d.update(normalizer={"type": "NFC"}), r"normalises text \(NFC\)"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "neither a byte-level nor a sentencepiece tokenizer"),
        (lambda d: d["pre_tokenizer"].update(use_regex=False), "splits text in a way that has no name in llama.cpp"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "neither a byte-level nor a sentencepiece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change: Any, said: str, tokenizer: HuggingFace, tmp_path: Path) -> None:
    described = json.loads(tokenizer.files[0].read_text())
    change(described)
    for file in tokenizer.files[1:]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=said):
        gguf_tokenizer.settings(HuggingFace(tmp_path), 400, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of kind 'bert'"),
        ({"tokenizer.ggml.pre": "falcon"}, "split as 'falcon' has it, which is not read here"),
        ({"tokenizer.ggml.eos_token_id": 10_000}, "a eos_token 10000"),
        ({"tokenizer.ggml.eos_token_id": None}, "names no end of sequence"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "but 2 token types"),
        ({"tokenizer.ggml.merges": ["abc"]}, "'abc' is no merge of two tokens"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer of kind 'gpt2'"),
    ],
)
def test_a_tokenizer_in_a_file_that_is_not_read(change: Any, said: str, tokenizer: HuggingFace, tmp_path: Path) -> None:
    found = {**gguf_tokenizer.settings(tokenizer, 352, None), **change}
    with pytest.raises(ValueError, match=f"{said}.*name a(?: tokenizer|) in data.tokenizer|{said}"):
        gguf_tokenizer.extract({k: v for k, v in found.items() if v is not None}, tmp_path, "file.gguf")


# --- files that are damaged or lie ---------------------------------------------------------------------------------


def text_of(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, code: int, value: bytes) -> bytes:
    return text_of(name) + struct.pack("<I", code) + value


def tensor(name: str, dims: tuple[int, ...] = (4,), code: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    return text_of(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims) if count is None else count, *dims, code, offset)


def file_of(
    keys: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (tensor("x"),), data: int = 64, start: bytes = b"GGUF",
    version: int = 3, num_tensors: int | None = None, num_keys: int | None = None,
) -> bytes:  # fmt: skip
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    header = start + struct.pack("<IQQ", version, *counts) + b"".join((*keys, *tensors))
    return header + bytes(-len(header) % 32 + data)


HUGE = 2**63
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file: it has 0 bytes"),
    "cut in the counts": (file_of()[:20], "no GGUF file: it has 20 bytes"),
    "another magic": (file_of(start=b"GGML"), r"begins with b'GGML'"),
    "version 1": (file_of(version=1), "GGUF version 1; read are 2 and 3"),
    "a future version": (file_of(version=4), "GGUF version 4"),
    "big-endian": (file_of(version=3 << 24), "big-endian"),
    "too many tensors": (file_of(num_tensors=HUGE), "damaged: 9,223,372,036,854,775,808 tensors"),
    "too many keys": (file_of(num_keys=HUGE), "damaged: 9,223,372,036,854,775,808 keys"),
    "a tensor more than there is": (file_of(num_tensors=2), "damaged|dims"),
    "a key more than there is": (file_of(num_keys=1), "unknown type|damaged|UTF-8"),
    "a key twice": (file_of((key("a", 4, bytes(4)), key("a", 4, bytes(4)))), "the key 'a' twice"),
    "a key of 2**63 letters": (file_of((struct.pack("<Q", HUGE),)), "bytes for a key"),
    "a key that is no text": (file_of((struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8),)), "a key is not UTF-8"),
    "a text of 2**63 letters": (file_of((key("a", 8, struct.pack("<Q", HUGE)),)), "bytes for a at byte"),
    "an unknown kind of value": (file_of((key("a", 13, bytes(8)),)), "a has the unknown type 13"),
    "2**63 numbers": (file_of((key("a", 9, struct.pack("<IQ", 4, HUGE)),)), "numbers in a"),
    "2**63 texts": (file_of((key("a", 9, struct.pack("<IQ", 8, HUGE)),)), "strings in a"),
    "2**60 bytes": (file_of((key("a", 9, struct.pack("<IQ", 0, 2**60)),)), "numbers in a"),
    "lists in a list": (file_of((key("a", 9, struct.pack("<IQ", 9, 1)),)), "array of the type 9"),
    "an alignment of 0": (file_of((key("general.alignment", 4, struct.pack("<I", 0)),)), "general.alignment is 0"),
    "an alignment of 24": (file_of((key("general.alignment", 4, struct.pack("<I", 24)),)), "general.alignment is 24"),
    "an alignment in words": (file_of((key("general.alignment", 8, text_of("32")),)), "general.alignment is '32'"),
    "a name of 2**63 letters": (file_of(tensors=(struct.pack("<Q", HUGE) + bytes(32),)), "bytes for a tensor's name"),
    "no dims": (file_of(tensors=(tensor("x", (4,), count=0),)), "x has 0 dims"),
    "2**32 dims": (file_of(tensors=(tensor("x", (4,), count=2**32 - 1),)), "x has 4294967295 dims"),
    "a dim of 0": (file_of(tensors=(tensor("x", (0, 4)),)), r"x has the shape \(4, 0\)"),
    "2**80 numbers": (file_of(tensors=(tensor("x", (2**40, 2**40)),)), "x has the shape"),
    "2**50 numbers": (file_of(tensors=(tensor("x", (2**50,)),)), "truncated: x ends at byte"),
    "an unknown type": (file_of(tensors=(tensor("x", (32,), 99),)), "x has the type 99"),
    "a type that was removed": (file_of(tensors=(tensor("x", (32,), 4),)), "x has the type 4"),
    "a type that holds no weights": (file_of(tensors=(tensor("x", (32,), 24),)), "x has the type 24"),
    "part of a block": (file_of(tensors=(tensor("x", (33,), 8),)), "rows of 33 numbers; Q8_0 has blocks of 32"),
    "a tensor twice": (file_of(tensors=(tensor("x"), tensor("x", offset=32))), "the tensor x twice"),
    "off the alignment": (file_of(tensors=(tensor("x", offset=8),)), "x is at 8, which is no multiple of the alignment 32"),
    "overlapping": (file_of(tensors=(tensor("x", (16,)), tensor("y", offset=32))), "y overlaps x"),
    "in one place": (file_of(tensors=(tensor("x"), tensor("y"))), "y overlaps x"),
    "beyond the end": (file_of(tensors=(tensor("x", offset=2**62),)), "truncated: x ends at byte"),
    "cut in the data": (file_of()[:-60], "truncated: x ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, said = MALFORMED[name]
    (tmp_path / "x.gguf").write_bytes(content)
    before = time.monotonic()
    with pytest.raises(ValueError, match=said) as error:
        container.open_file(tmp_path / "x.gguf")
    assert time.monotonic() - before < 2 and "\n" not in str(error.value) and "x.gguf" in str(error.value)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    """What the damaged ones are made of."""
    (tmp_path / "x.gguf").write_bytes(file_of((key("a", 9, struct.pack("<IQ2I", 4, 2, 7, 8)), key("b", 7, b"\1")), data=16))
    opened = container.open_file(tmp_path / "x.gguf")
    assert opened.settings["a"].tolist() == [7, 8] and opened.settings["b"] is True
    assert opened.tensors["x"].read().tolist() == [0, 0, 0, 0]


@given(st.data())
@settings(max_examples=400, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Never another exception, never more memory than the file has bytes, never a read beyond it."""
    keys = (
        key("general.alignment", 4, struct.pack("<I", 32)),
        key("t", 9, struct.pack("<IQ", 8, 2) + text_of("ab") + text_of("c")),
    )
    content = bytearray(file_of((*keys, key("n", 6, bytes(4))), (tensor("x", (4, 2)), tensor("y", (32,), 8, 32)), data=96))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(content) - 97))
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 8, 9, 127, 128, 255])))
    end = data.draw(st.integers(24, len(content)) | st.just(len(content)))
    (tmp_path / "x.gguf").write_bytes(content[:end])
    try:
        opened = container.open_file(tmp_path / "x.gguf")
    except ValueError as error:
        assert "\n" not in str(error)
        return
    for found in opened.tensors.values():
        assert found.read().shape == found.shape

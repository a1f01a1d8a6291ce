"""The proof: every way in which other tools' exports have gone wrong is planted here, and found at the export and later."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.commands.train_tokenizer import train_bpe
from moe_train.commands.verify import verify
from moe_train.data.records.conversation import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine import progress
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.proof import expected, repeat, reread, surroundings
from moe_train.proof import logits as answers
from moe_train.proof import prove as proof
from moe_train.weights import external, names, peft
from moe_train.weights import texts as text_files
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora
from moe_train.weights.texts import Texts

MODEL = config.Model(
    family="mixtral",
    vocab_size=288,
    model_dim=32,
    num_layers=2,
    max_seq_len=64,
    attention=config.Attention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=32, num_experts=4, experts_per_token=2),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),))
ONE = make_mesh(config.Mesh(), jax.devices()[:1])
LAYOUTS = [("hf", "float32"), ("hf", "bfloat16"), ("mistral", "float32"), ("gguf", "q8_0"), ("gguf", "bf16")]
CHAT = Conversation([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}], [])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    tokenizer = train_bpe(["one two three four"] * 5, 270, tmp_path_factory.mktemp("tokenizer") / "t")
    return Texts(tokenizer, tokenizer.chat_template, "name: run\n")


@pytest.fixture(scope="module")
def weights() -> dict[str, jax.Array]:
    draw = np.random.default_rng(0).normal
    with jax.set_mesh(ONE):
        shapes = parameters(jax.eval_shape(lambda: init_model(0, MODEL, config.Compute(), LORA)))[1]
        return {
            path: jax.device_put(draw(0, 0.2, like.shape).astype(like.dtype), NamedSharding(ONE, like.sharding.spec))
            for path, like in shapes.items()
        }


def make(out: Path, weights: dict[str, jax.Array], texts: Texts, layout: Any, dtype: str, **options: Any) -> dict[str, Any]:
    lora = LORA if any(".lora_" in path for path in weights) else None
    with jax.set_mesh(ONE):
        return write_and_prove.export(
            *(weights, MODEL, out, layout),
            **{"dtype": dtype, "lora": lora, "merge": lora is not None, "texts": texts, "conversations": [CHAT], **options},
        )


@pytest.fixture(scope="module")
def exports(
    weights: dict[str, jax.Array], texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """(a merged export, one of the base alone) of a layout and dtype."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def find(layout: str, dtype: str) -> tuple[Path, Path]:
        if (layout, dtype) not in made:
            paths = folder / f"{layout}-{dtype}", folder / f"{layout}-{dtype}-base"
            make(paths[0], weights, texts, layout, dtype)
            plain = {path: x for path, x in weights.items() if ".lora_" not in path}
            make(paths[1], plain, texts, layout, dtype, depth="tensors")
            made[layout, dtype] = paths
        return made[layout, dtype]

    return find


# --- faults: each changes the files of a directory ---------------------------------------------------------------------


def patch(directory: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the bytes of a tensor, (rows, bytes of a row), where they are."""
    stored = reread.tensors(directory)[name]
    with stored.file.open("r+b") as file:
        raw = stored.read(file.fileno(), 0, stored.rows)
        changed = change(np.frombuffer(raw, np.uint8).reshape(stored.rows, -1))
        file.seek(stored.offset)
        file.write(np.ascontiguousarray(changed).tobytes())


def expert(layout: str, e: int) -> tuple[str, slice]:
    """Tensor and rows of expert e's down projection in layer 1."""
    if layout == "gguf":
        return "blk.1.ffn_down_exps.weight", slice(32 * e, 32 * (e + 1))
    if layout == "mistral":
        return f"layers.1.feed_forward.experts.{e}.w2.weight", slice(None)
    return f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight", slice(None)


def drop_expert_delta(directory: Path, base: Path, layout: str) -> None:
    name, rows = expert(layout, 2)
    untouched = reread.tensors(base)[name]
    with untouched.file.open("rb") as file:
        raw = np.frombuffer(untouched.read(file.fileno(), 0, untouched.rows), np.uint8).reshape(untouched.rows, -1)

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        found[rows] = raw[rows]
        return found

    patch(directory, name, change)


def swap_experts(directory: Path, base: Path, layout: str) -> None:
    (one, rows), (other, other_rows) = expert(layout, 1), expert(layout, 3)
    kept: dict[str, np.ndarray] = {}
    patch(directory, one, lambda found: kept.setdefault("one", found.copy()))
    patch(directory, other, lambda found: kept.setdefault("other", found.copy()))

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        if one == other:
            found[rows], found[other_rows] = kept["one"][other_rows], kept["one"][rows]
        else:
            found[:] = kept["other"] if found.tobytes() == kept["one"].tobytes() else kept["one"]
        return found

    for name in {one, other}:
        patch(directory, name, change)


def transpose_rotary(directory: Path, base: Path, layout: str) -> None:
    name = {
        "hf": "model.layers.0.self_attn.k_proj.weight",
        "mistral": "layers.0.attention.wk.weight",
        "gguf": "blk.0.attn_k.weight",
    }
    halves = (2, 4) if layout == "hf" else (4, 2)
    patch(directory, name[layout], lambda rows: rows.reshape(2, *halves, -1).swapaxes(1, 2).reshape(rows.shape))


def flip_a_bit(directory: Path, base: Path, layout: str) -> None:
    name = {"hf": "lm_head.weight", "mistral": "output.weight", "gguf": "output.weight"}[layout]

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        found[7, 5] ^= 8
        return found

    patch(directory, name, change)


def change_template(directory: Path, base: Path, layout: str) -> None:
    file = directory / ("model.gguf" if layout == "gguf" else "chat_template.jinja")
    content = file.read_bytes()
    assert content.count(b"{{- '[INST]'") == 1
    file.write_bytes(content.replace(b"{{- '[INST]'", b"{{- '[INSI]'"))


def forget_generation(directory: Path, base: Path, layout: str) -> None:
    (directory / "generation_config.json").unlink()


def change_tokenizer(directory: Path, base: Path, layout: str) -> None:
    file = directory / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Load the one file of weights, change the tensors, and write it and its index anew."""
    (file,) = directory.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    for index in directory.glob("*.index.json"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))


def add_a_tensor(directory: Path, base: Path, layout: str) -> None:
    rewrite(directory, lambda tensors: tensors.update({"extra.weight": np.ones(3, np.float32)}))


def drop_a_tensor(directory: Path, base: Path, layout: str) -> None:
    rewrite(directory, lambda tensors: tensors.__delitem__(sorted(tensors)[5]))


def change_a_dtype(directory: Path, base: Path, layout: str) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith("norm.weight"))
        tensors[name] = tensors[name].astype(np.float16)

    rewrite(directory, change)


EVERYWHERE = [
    (drop_expert_delta, "tensors"),
    (swap_experts, "tensors"),
    (transpose_rotary, "tensors"),
    (flip_a_bit, "tensors"),
    (change_template, "template"),
    (change_tokenizer, "tokenizer"),
]
SAFETENSORS = [(add_a_tensor, "tensors"), (drop_a_tensor, "tensors"), (change_a_dtype, "tensors")]
CASES = [(layout, dtype, fault, check) for layout, dtype in LAYOUTS for fault, check in EVERYWHERE]
CASES += [(layout, dtype, fault, check) for layout, dtype in LAYOUTS if layout != "gguf" for fault, check in SAFETENSORS]
CASES += [("hf", "bfloat16", forget_generation, "generation")]


@pytest.mark.parametrize(("layout", "dtype", "fault", "check"), CASES)
def test_a_planted_fault_stops_the_export_and_is_found_later(
    layout: Any,
    dtype: str,
    fault: Any,
    check: str,
    exports: Any,
    weights: Any,
    texts: Texts,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    export, base = exports(layout, dtype)
    copy_texts = text_files.write_texts

    def faulty(directory: Path, *arguments: Any) -> None:
        copy_texts(directory, *arguments)
        fault(directory, base, layout)

    monkeypatch.setattr(write_and_prove, "write_texts", faulty)
    with pytest.raises(RuntimeError, match=rf"the proof failed \([^)]*{check}"):
        make(tmp_path / "out", weights, texts, layout, dtype, depth="tensors")
    assert not list(tmp_path.iterdir())

    shutil.copytree(export, tmp_path / "copy")
    fault(tmp_path / "copy", base, layout)
    _, checks = verify(tmp_path / "copy", depth="tensors")
    failed = {check.name for check in checks if check.passed is False}
    assert failed >= {"files", check} - {"tokenizer"}, failed  # a tokenizer's own files are among `files`


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_a_good_export_passes_everything_again(layout: str, dtype: str, exports: Any) -> None:
    export, _ = exports(layout, dtype)
    record, checks = verify(export)
    assert {check.name: check.passed for check in checks} == {
        **{"files": True, "architecture": True, "tensors": True, "merge": None, "answers": True, "template": True},
        "generation": None if layout == "mistral" else True,
    }
    by_name = {check["name"]: check for check in record["checks"]}
    assert all(check["passed"] for name, check in by_name.items() if not (layout == "mistral" and name == "generation"))
    assert by_name["merge"]["figures"]["count"] == 2 * (4 + 3 * 4) and by_name["template"]["figures"]["training"] == 1
    assert by_name["answers"]["figures"]["positions"] > 30
    assert set(record["files"]) == {file.name for file in export.iterdir()} - {"export_proof.json"}


def forge(directory: Path) -> None:
    """Bring the record's hashes in line with the files: somebody changed them, and made a new record of hashes."""
    record = json.loads((directory / surroundings.FILE).read_text())
    record["files"] = surroundings.file_hashes(directory)
    stored = reread.tensors(directory)
    found = repeat.compare.examine(stored, repeat.as_stored(stored), None, None).examined
    record["tensors"] = {name: {**record["tensors"][name], "sha256": found[name].sha256} for name in stored}
    (directory / surroundings.FILE).write_text(json.dumps(record))


@pytest.mark.parametrize("fault", [drop_expert_delta, swap_experts, transpose_rotary])
@pytest.mark.parametrize(("layout", "dtype"), [("hf", "bfloat16"), ("mistral", "float32"), ("gguf", "q8_0")])
def test_the_answers_alone_find_what_changes_the_model(layout: str, dtype: str, fault: Any, exports: Any, tmp_path: Path) -> None:
    export, base = exports(layout, dtype)
    shutil.copytree(export, tmp_path / "copy")
    fault(tmp_path / "copy", base, layout)
    forge(tmp_path / "copy")
    _, checks = verify(tmp_path / "copy")
    assert [check.name for check in checks if check.passed is False] == ["answers"]


def test_a_slip_in_the_table_of_names_is_found(weights: Any, texts: Texts, tmp_path: Path, monkeypatch: Any) -> None:
    """Both the writer and the loader use the table: what they agree upon may still be wrong."""
    gate, up, down = names.MISTRAL.experts
    swapped = (gate._replace(name=up.name), up._replace(name=gate.name), down)
    monkeypatch.setattr(names, "MISTRAL", dataclasses.replace(names.MISTRAL, experts=swapped))
    with pytest.raises(RuntimeError, match=r"the proof failed \(tensors\): layers\.0\.feed_forward\.experts\.0\.w1"):
        make(tmp_path / "out", weights, texts, "mistral", "float32")


def test_merged_again_from_the_weights_in_memory(exports: Any, weights: Any, tmp_path: Path) -> None:
    """What `verify --run` does; and --base with the base's own files."""
    export, base = exports("hf", "bfloat16")
    record, model = repeat.read_record(export)

    def merge(directory: Path, parameters: dict[str, jax.Array], **more: Any) -> Any:
        with jax.set_mesh(ONE):
            trained = proof.Export(directory, "hf", "bfloat16", parameters, model, LORA, None, None)
            checks = repeat.repeat(directory, "tensors", record, model, trained if parameters else None, **more)
        return next(check for check in checks if check.name == "merge")

    assert merge(export, weights).passed
    path = "stacks.0.layers.0.ffn.up_proj.lora_b"
    other = merge(export, {**weights, path: weights[path] * 1.5})
    assert other.passed is False and "with its adapter" in other.said
    of_base = merge(export, {}, base=external.open_weights(base))
    assert of_base.passed and of_base.figures["count"] == 3 + 2 * 3  # norms, router, both ends
    assert of_base.figures["adapted"] == 2 * (4 + 3 * 4) and of_base.figures["untrained"] == 0


def change_router(directory: Path, base: Path, layout: str) -> None:
    names = {"hf": "model.layers.0.block_sparse_moe.gate.weight", "mistral": "layers.0.feed_forward.gate.weight"}
    patch(directory, names.get(layout, "blk.0.ffn_gate_inp.weight"), lambda rows: rows[::-1])


def scale_expert(directory: Path, base: Path, layout: str) -> None:
    """Half as large: no whole fault of names or order."""
    name, rows = expert(layout, 2)

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        numbers = found.view({"hf": ml_dtypes.bfloat16, "mistral": np.float32, "gguf": reread.Q8_0}[layout])
        halved = numbers["scale"] if layout == "gguf" else numbers
        halved[rows] = halved[rows] / 2
        return found

    patch(directory, name, change)


BESIDE_BASE = {
    drop_expert_delta: r"is the base's: its delta is gone \(1 such",
    swap_experts: "less the base's is no change of rank 2",
    transpose_rotary: "less the base's is no change of rank 2",
    scale_expert: "less the base's is no change of rank 2",
    change_router: "was not adapted, and is not the base's",
}


@pytest.mark.parametrize(("layout", "dtype"), [("hf", "bfloat16"), ("mistral", "float32"), ("gguf", "q8_0")])
@pytest.mark.parametrize("fault", BESIDE_BASE)
def test_the_base_alone_shows_whether_files_are_a_merge(layout: str, dtype: str, fault: Any, exports: Any, tmp_path: Path) -> None:
    """Whatever layout the base has; also where the record was brought in line with the files."""
    export, own_base = exports(layout, dtype)
    base = exports("hf", "float32")[1]
    _, checks = verify(export, base=base, depth="tensors")
    assert [check.said for check in checks if check.name == "merge" and not check.passed] == []
    shutil.copytree(export, tmp_path / "copy")
    fault(tmp_path / "copy", own_base, layout)
    forge(tmp_path / "copy")
    _, checks = verify(tmp_path / "copy", base=base, depth="tensors")
    (merge,) = (check for check in checks if check.name == "merge")
    if (layout, fault) == ("gguf", drop_expert_delta):
        assert "not told from rounding" in merge.said
        return
    assert merge.passed is False and re.search(BESIDE_BASE[fault], merge.said), merge


@pytest.mark.parametrize(("layout", "dtype"), [("hf", "bfloat16"), ("gguf", "q8_0")])
def test_base_and_adapter_show_every_delta(layout: str, dtype: str, exports: Any, weights: Any, tmp_path: Path) -> None:
    export, own_base = exports(layout, dtype)
    base = exports("hf", "float32")[1]
    with jax.set_mesh(ONE):
        peft.export_adapter(weights, MODEL, LORA, tmp_path / "adapter", base_model=str(base))
    _, checks = verify(export, base=base, adapter=tmp_path / "adapter", depth="tensors")
    assert [check.said for check in checks if check.name == "merge" and check.passed] != []
    shutil.copytree(export, tmp_path / "copy")
    drop_expert_delta(tmp_path / "copy", own_base, layout)
    forge(tmp_path / "copy")
    _, checks = verify(tmp_path / "copy", base=base, adapter=tmp_path / "adapter", depth="tensors")
    (merge,) = (check for check in checks if check.name == "merge")
    assert merge.passed is False and "with its adapter" in merge.said
    with pytest.raises(ValueError, match="give both, or --run"):
        verify(export, adapter=tmp_path / "adapter")
    other = MODEL.model_copy(update={"num_layers": 1})
    with jax.set_mesh(ONE):
        one = {path: x[:1] if path.startswith("stacks.") else x for path, x in weights.items() if ".lora_" not in path}
        write_and_prove.export(one, other, tmp_path / "other", dtype="float32", depth="tensors")
    _, checks = verify(export, base=tmp_path / "other", depth="tensors")
    assert [check.said for check in checks if check.name == "merge"] == ["the files describe another model: num_layers is 1, not 2"]


@pytest.mark.parametrize("layout", ["hf", "mistral", "gguf"])
def test_whoever_listens_hears_how_far_it_is(layout: str, weights: Any, texts: Texts, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    with progress.listening(lambda *told: heard.append(told)):
        make(tmp_path / "made", weights, texts, layout, "bf16" if layout == "gguf" else "bfloat16", depth="tensors")
        verify(tmp_path / "made", base=tmp_path / "made", depth="tensors")
    ended = [what for what, done, total in heard if done == total]
    assert ended == ["writing", "reading the files", "reading the files", "comparing with the base"]
    assert all(0 <= done <= total for _, done, total in heard) and len(heard) > 50


# --- answers -------------------------------------------------------------------------------------------------------


def test_near_ties_are_counted_and_what_follows_them_is_left_out() -> None:
    T = 6
    prompts = answers.Prompts(np.zeros((1, T), int), np.arange(T)[None])
    routers = np.tile(np.array([4.0, 3.0, 1.0, 0.0]), (2, 1, T, 1))
    logits = np.random.default_rng(0).normal(size=(1, T, 8)).astype(np.float32)
    wanted = answers.reference(answers.Answers(logits, routers), MODEL)
    assert answers.compare(answers.Answers(logits, routers), wanted, prompts, MODEL, 1e-3).wrong == 0

    tie = routers.copy()
    tie[0, 0, 3] = [4.0, 3.0 - 1e-5, 3.0, 0.0]  # experts 0 and 2
    tie[1, 0, 4] = [0.0, 1.0, 2.0, 3.0]  # comes after it: whatever it chose is not compared
    moved = logits.copy()
    moved[0, 3:] += 100
    found = answers.compare(answers.Answers(moved, tie), wanted, prompts, MODEL, 1e-3)
    assert (found.near_ties, found.wrong, found.positions, found.excluded) == (1, 0, 3, 3)
    assert found.logits == 0 and found.choices == T + 3

    other = routers.copy()
    other[1, 0, 2] = [4.0, 1.0, 3.0, 0.0]
    assert answers.compare(answers.Answers(logits, other), wanted, prompts, MODEL, 1e-3).first_wrong == (1, 0, 2)


def test_the_answers_are_the_models_own(weights: dict[str, jax.Array]) -> None:
    with jax.set_mesh(ONE):
        structure, _ = answers.structure_and_shapes(MODEL, LORA, "float32")
        prompts = answers.fixed_prompts(MODEL, None)
        found = answers.answers(structure, weights, prompts)
        model = answers.combine(structure, weights)
        segments = np.ones(prompts.tokens_PT.shape, np.int32)
        hidden, _ = model(*put_batch(tuple(x.astype(np.int32) for x in (*prompts, segments)), ONE))
        logits = np.asarray(model.logits(hidden))
    assert np.abs(found.logits_PTV - logits).max() / np.abs(logits).max() < 1e-5
    assert found.routers_LPTE is not None and found.routers_LPTE.shape == (2, 4, 16, 4)


# --- adapters ------------------------------------------------------------------------------------------------------


def write_adapter(layout: str, directory: Path, weights: dict[str, jax.Array], texts: Texts) -> None:
    if layout == "peft":
        peft.export_adapter(weights, MODEL, LORA, directory, base_model="base", texts=texts)
    elif layout == "gguf-lora":
        gguf_lora.export_adapter(weights, MODEL, LORA, directory, base_model="base", texts=texts)
    else:
        mistral_lora.export_adapter(weights, MODEL, LORA, directory, dtype="float32", texts=texts)


def double_scale(directory: Path, layout: str) -> None:
    file = directory / ("adapter_config.json" if layout == "peft" else "params.json")
    settings = json.loads(file.read_text())
    section, key = (settings, "lora_alpha") if layout == "peft" else (settings["lora"], "scaling")
    section[key] *= 2
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize("layout", ["peft", "mistral-lora"])
def test_a_fault_in_an_adapter_is_found(layout: Any, weights: Any, texts: Texts, tmp_path: Path) -> None:
    def prove(directory: Path) -> dict[str, Any]:
        with jax.set_mesh(ONE):
            return proof.prove_adapter(directory, layout, weights, MODEL, LORA, texts.tokenizer, texts.chat_template, [CHAT], {})

    write_adapter(layout, tmp_path / "good", weights, texts)
    proof.write(tmp_path / "good", prove(tmp_path / "good"))
    _, checks = verify(tmp_path / "good")
    assert not [check for check in checks if check.passed is False]
    first, second = (expected.adapter_names(layout, expert("hf" if layout == "peft" else "mistral", e)[0])[1] for e in (0, 1))

    def zero(tensors: dict[str, np.ndarray]) -> None:
        tensors[first] = np.zeros_like(tensors[first])

    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    def drop(tensors: dict[str, np.ndarray]) -> None:
        del tensors[first]

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["extra"] = np.ones(3, np.float32)

    with pytest.raises(RuntimeError, match=r"\(deltas\): the adapter of .* in the files is not the one in memory"):
        shutil.copytree(tmp_path / "good", tmp_path / "rescale")
        double_scale(tmp_path / "rescale", layout)
        prove(tmp_path / "rescale")
    for fault, check in ((zero, "deltas"), (swap, "deltas"), (drop, "tensors"), (add, "tensors")):
        directory = tmp_path / fault.__name__
        shutil.copytree(tmp_path / "good", directory)
        rewrite(directory, fault)
        with pytest.raises(RuntimeError, match=rf"the proof failed \([^)]*{check}"):
            prove(directory)
        _, checks = verify(directory)
        assert {"files", "tensors"} <= {check.name for check in checks if check.passed is False}


def test_a_fault_in_a_gguf_adapter_is_found(weights: Any, texts: Texts, tmp_path: Path) -> None:
    write_adapter("gguf-lora", tmp_path / "good", weights, texts)
    arguments = ("gguf-lora", weights, MODEL, LORA, None, None, [], {})
    with jax.set_mesh(ONE):
        record = proof.prove_adapter(tmp_path / "good", *arguments)
        proof.write(tmp_path / "good", record)
        (deltas,) = (check for check in record["checks"] if check["name"] == "deltas")
        assert deltas["figures"]["count"] == 2 * (4 + 3 * 4) and not deltas["figures"]["untrained"]
        name = "blk.1.ffn_down_exps.weight.lora_b"
        shutil.copytree(tmp_path / "good", tmp_path / "zero")
        patch(tmp_path / "zero", name, lambda rows: np.where(np.arange(len(rows))[:, None] < 32, 0, rows))  # of expert 0
        with pytest.raises(RuntimeError, match=r"\(deltas\): .*down_proj\[1, 0\] in the files is not .* \(1 matrices in all\)"):
            proof.prove_adapter(tmp_path / "zero", *arguments)
        patch(tmp_path / "good", name, lambda rows: np.roll(rows, 32, axis=0))
        with pytest.raises(RuntimeError, match=r"\(deltas\): the adapter of stacks\.0\.layers\.0\.ffn\.down_proj\[1, 0\]"):
            proof.prove_adapter(tmp_path / "good", *arguments)
    _, checks = verify(tmp_path / "good")
    assert {check.name for check in checks if check.passed is False} == {"files", "tensors"}


def test_what_was_trained_in_full_beside_an_adapter_is_compared(weights: Any, texts: Texts, tmp_path: Path) -> None:
    lora = LORA.model_copy(update={"train": ("*norm", "ffn.router", "embed")})
    peft.export_adapter(weights, MODEL, lora, tmp_path / "out", base_model="base", texts=texts)
    with jax.set_mesh(ONE):
        proof.prove_adapter(tmp_path / "out", "peft", weights, MODEL, lora, None, None, [], {})
        moved = {**weights, "stacks.0.layers.0.ffn.router.weight": weights["stacks.0.layers.0.ffn.router.weight"] + 1}
        with pytest.raises(RuntimeError, match=r"\(tensors\): .*mlp\.gate\.weight .* is not stacks"):
            proof.prove_adapter(tmp_path / "out", "peft", moved, MODEL, lora, None, None, [], {})


def test_a_record_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no export_proof\.json; only what moe-train export wrote"):
        verify(tmp_path)
    for text in ("{}", "[]", "{", '{"format": "hf", "files": {}, "tensors": {}, "model": 3}', '{"format": 1, "files": 1}'):
        (tmp_path / surroundings.FILE).write_text(text)
        with pytest.raises(ValueError, match=r"^[^\n]*export_proof\.json[^\n]*$"):
            verify(tmp_path)


def test_tokenizers_are_read_from_the_directory(exports: Any) -> None:
    export, _ = exports("hf", "float32")
    tokenizer, template = repeat.texts.reopened(export, "hf")
    assert isinstance(tokenizer, HuggingFace) and tokenizer.path == export and template

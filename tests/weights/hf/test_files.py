"""Export and load, torch-free: bits, meshes, merging, the proof and what it catches, and failures that leave nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.commands import write_and_prove as write
from moe_train.model.paths import ParameterPath
from moe_train.weights import external, names, safetensors_files, texts
from tests.random_parameters import abstract, assert_equal, random_parameters
from tests.tiny import EIGHT, LORA, MINISTRAL, MIXTRAL, ONE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL], ids=["mixtral", "ministral"])
def test_an_export_is_read_back_bit_for_bit_on_any_mesh(model: config.Model, dtype: Any, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        sharded = random_parameters(model, dtype)
        report = write.export_model(sharded, model, tmp_path / "out", write.WriteOptions(dtype=dtype, max_shard_bytes=2000))
        assert_equal(external.load_external_parameters(tmp_path / "out", abstract(model, dtype)), sharded)
        for path, array in external.load_external_parameters(tmp_path / "out", abstract(model, dtype)).items():
            assert array.sharding == sharded[path].sharding
    assert external.read_external_model(tmp_path / "out") == model
    tensors = figures(report, "tensors")
    assert tensors["parameters"] == sum(array.size for array in sharded.values())
    assert tensors["bytes"] == tensors["parameters"] * np.dtype(dtype).itemsize
    with jax.set_mesh(ONE):
        assert_equal(external.load_external_parameters(tmp_path / "out", abstract(model, dtype)), sharded)


@pytest.mark.parametrize("layout", ["hf", "mistral", "gguf"])
@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL], ids=["mixtral", "ministral"])
def test_weights_left_in_their_files_are_merged_and_proved_as_those_in_memory(
    model: config.Model, layout: Any, tmp_path: Path
) -> None:
    depth: Any = "full" if layout == "hf" else "tensors"
    with jax.set_mesh(EIGHT):
        weights = random_parameters(model, "bfloat16", LORA)
        plain = {path: x for path, x in weights.items() if not ParameterPath.parse(path).is_adapter}
        write.export_model(
            plain,
            model,
            tmp_path / "base",
            write.WriteOptions(layout=layout, dtype="bf16" if layout == "gguf" else "bfloat16", depth="tensors"),
        )
        left = external.open_external_lazily(tmp_path / "base", abstract(model, "bfloat16"))
        reports = [
            write.export_model(
                source, model, tmp_path / name, write.WriteOptions(dtype="bfloat16", lora=LORA, merge=True, depth=depth)
            )
            for name, source in (("memory", weights), ("files", weights | left))
        ]
    for name in ("model-00001-of-00001.safetensors", "config.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    for check in ("merge", "answers") if depth == "full" else ("merge",):
        assert figures(reports[0], check) == figures(reports[1], check)


def test_the_files_of_an_export(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        write.export_model(
            random_parameters(MIXTRAL),
            MIXTRAL,
            tmp_path / "out",
            write.WriteOptions(dtype="bfloat16", texts=texts.Texts(chat_template="{{ x }}", config="a: 1\n")),
        )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "export_proof.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "moe_train.yaml",
    ]
    assert set(json.loads((tmp_path / "out/generation_config.json").read_text())) >= {"bos_token_id", "eos_token_id"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    with jax.set_mesh(ONE), pytest.raises(FileExistsError, match="already exists"):
        write.export_model(random_parameters(MIXTRAL), MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="bfloat16"))


def test_the_fused_layout_and_the_prefix_of_a_wrapper_are_read(tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(MIXTRAL)
        write.export_model(parameters, MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="float32"))
        fused: dict[str, np.ndarray] = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
        for piece in names.weight_pieces(MIXTRAL, names.hugging_face("model.language_model.", "", experts="fused")):
            tensor = fused.setdefault(piece.name, np.zeros(piece.shape, np.float32))
            part = tuple(at if isinstance(at, int) else slice(*at) for at in piece.part)
            tensor[part] = piece.to_file(np.asarray(parameters[piece.path])[piece.lead])
        for file in (tmp_path / "out").glob("model*"):
            file.unlink()
        safetensors.numpy.save_file(fused, tmp_path / "out/model.safetensors")
        assert_equal(external.load_external_parameters(tmp_path / "out", abstract(MIXTRAL)), parameters)


def figures(report: dict[str, Any], check: str) -> dict[str, Any]:
    (found,) = (c["figures"] for c in report["checks"] if c["name"] == check)
    return found


def plain_merge(parameters: dict[str, jax.Array], path: str) -> np.ndarray:
    """base + alpha / rank * A·B for the whole stack; equations written out by hand."""
    base = np.asarray(parameters[path], np.float64)
    module = path.removesuffix(".weight")
    if f"{module}.lora_a" not in parameters:
        return base
    a, b = (np.asarray(parameters[f"{module}.lora_{x}"], np.float64) for x in "ab")
    equation = {
        "q_proj": "rdj,rjnh->rdnh",
        "o_proj": "rnhj,rjd->rnhd",
        "gate_proj": "redj,rejf->redf",
        "up_proj": "redj,rejf->redf",
        "down_proj": "refj,rejd->refd",
    }[module.split(".")[-1]]
    return base + (1.5 if "attention" in path else 2.0) * np.einsum(equation, a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_base_plus_delta_rounded_once(dtype: Any, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(MIXTRAL, lora=LORA)
        report = write.export_model(parameters, MIXTRAL, tmp_path / "out", write.WriteOptions(dtype=dtype, lora=LORA, merge=True))
        loaded = external.load_external_parameters(tmp_path / "out", abstract(MIXTRAL, dtype))
    for path, array in loaded.items():
        assert np.array_equal(np.asarray(array), plain_merge(parameters, path).astype(dtype)), path
    merge = figures(report, "merge")
    assert merge["count"] == 4 * (2 + 3 * 4) and merge["untrained"] == 0
    assert 0.99 < merge["delta_kept"] < 1.01


def test_the_report_tells_of_deltas_that_the_dtype_swallows(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL, lora=LORA)
        lost = {path: x * 1e-5 if path.endswith("lora_b") else x for path, x in parameters.items()}
        with pytest.raises(RuntimeError, match=r"the delta of .* is lost: the file's numbers are those of the base, rounded"):
            write.export_model(lost, MIXTRAL, tmp_path / "lost", write.WriteOptions(dtype="bfloat16", lora=LORA, merge=True))
        small = {path: x * 1e-3 if path.endswith("lora_b") else x for path, x in parameters.items()}
        report = write.export_model(small, MIXTRAL, tmp_path / "low", write.WriteOptions(dtype="bfloat16", lora=LORA, merge=True))
        assert abs(figures(report, "merge")["delta_kept"] - 1) > 0.005
        none = {path: x * 0 if path.endswith("lora_b") else x for path, x in parameters.items()}
        report = write.export_model(none, MIXTRAL, tmp_path / "none", write.WriteOptions(dtype="float32", lora=LORA, merge=True))
    assert figures(report, "merge")["untrained"] == figures(report, "merge")["count"] == 56


def test_weights_without_adapter_keep_their_bytes_through_a_lora_export(tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        write.export_model(random_parameters(MIXTRAL, "bfloat16"), MIXTRAL, tmp_path / "base", write.WriteOptions(dtype="bfloat16"))
        before = external.hash_external_model(tmp_path / "base")
        base = external.load_external_parameters(tmp_path / "base", abstract(MIXTRAL))  # float32 in memory
        parameters = random_parameters(MIXTRAL, lora=LORA) | base
        write.export_model(parameters, MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="bfloat16", lora=LORA, merge=True))
        after = external.hash_external_model(tmp_path / "out")
    adapted = ("q_proj", "o_proj", ".w1.", ".w2.", ".w3.")
    assert {name for name in before if before[name] != after[name]} == {n for n in before if any(part in n for part in adapted)}


# --- faults planted between memory and disk ----------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, alter: Callable[[str, Callable[[str], np.ndarray]], np.ndarray]) -> None:
    """Let the writer get `alter(name, tensor)` instead of `tensor(name)`."""
    write = safetensors_files.write_safetensors

    def faulty(
        file: Path, specs: list[safetensors_files.TensorSpec], tensor: Callable[[safetensors_files.TensorSpec], np.ndarray]
    ) -> None:
        by_name = {spec.name: spec for spec in specs}
        write(file, specs, lambda spec: alter(spec.name, lambda name: tensor(by_name[name])))

    monkeypatch.setattr(safetensors_files, "write_safetensors", faulty)


def swap_experts(name: str, tensor: Callable[[str], np.ndarray]) -> np.ndarray:
    one, other = "layers.2.block_sparse_moe.experts.1.w3.weight", "layers.2.block_sparse_moe.experts.3.w3.weight"
    return tensor(name.replace(one, other) if one in name else name.replace(other, one))


def one_value(name: str, tensor: Callable[[str], np.ndarray]) -> np.ndarray:
    array = tensor(name).copy()
    if name == "model.layers.3.self_attn.k_proj.weight":
        array[5, 1] = np.nextafter(array[5, 1], np.float32(9))
    return array


@pytest.mark.parametrize(
    ("alter", "message"), [(swap_experts, r"layers\.2\..*experts\.1\.w3"), (one_value, r"layers\.3\.self_attn\.k_proj")]
)
@pytest.mark.parametrize("merge", [False, True])
def test_the_proof_finds_a_wrong_tensor_and_removes_the_export(
    alter: Any, message: str, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, alter)
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL, lora=LORA if merge else None)
        with pytest.raises(RuntimeError, match=message):
            write.export_model(
                parameters,
                MIXTRAL,
                tmp_path / "out",
                write.WriteOptions(dtype="float32", lora=LORA if merge else None, merge=merge),
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_the_proof_finds_an_expert_whose_delta_was_dropped(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL, lora=LORA)
        victim = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
        base = np.asarray(parameters["stacks.0.layers.0.ffn.down_proj.weight"])[1, 2].T

        def drop(name: str, tensor: Callable[[str], np.ndarray]) -> np.ndarray:
            return base + np.float32(factor) * (tensor(name) - base) if name == victim else tensor(name)

        plant(monkeypatch, drop)
        with pytest.raises(RuntimeError, match=victim):
            write.export_model(parameters, MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="float32", lora=LORA, merge=True))
    assert not list(tmp_path.iterdir())


# --- what a user can do wrong ------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL)

        def full(name: str, tensor: Callable[[str], np.ndarray]) -> np.ndarray:
            if "layers.2" in name:
                raise OSError(28, "No space left on device")
            return tensor(name)

        with monkeypatch.context() as patch:
            plant(patch, full)
            with pytest.raises(OSError, match="No space left on device"):
                write.export_model(parameters, MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="float32"))
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(OSError, match=r"needs 3e-05 GB, but its disk has 1e-06 GB free"):
            write.export_model(parameters, MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="float32"))
    assert not list(tmp_path.iterdir())


def test_adapters_are_neither_dropped_nor_imagined(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL, lora=LORA)
        with pytest.raises(ValueError, match=r"merge them \(--merge\)"):
            write.export_model(parameters, MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="float32"))
        plain = {path: array for path, array in parameters.items() if not ParameterPath.parse(path).is_adapter}
        with pytest.raises(ValueError, match="no adapters to merge"):
            write.export_model(plain, MIXTRAL, tmp_path / "out", write.WriteOptions(dtype="float32", lora=LORA, merge=True))
    assert not list(tmp_path.iterdir())


def test_a_tied_head_that_was_written_out_is_dropped_where_it_is_the_embedding(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MINISTRAL)
        write.export_model(parameters, MINISTRAL, tmp_path / "out", write.WriteOptions(dtype="float32"))
        (shard,) = (tmp_path / "out").glob("model-*")
        (tmp_path / "out" / safetensors_files.INDEX_FILE).unlink()
        found = safetensors.numpy.load_file(shard)
        single = tmp_path / "out/model.safetensors"
        safetensors.numpy.save_file(found | {"lm_head.weight": found["model.embed_tokens.weight"]}, single)
        assert_equal(external.load_external_parameters(tmp_path / "out", abstract(MINISTRAL)), parameters)
        safetensors.numpy.save_file(found | {"lm_head.weight": found["model.embed_tokens.weight"] + 1}, single)
        with pytest.raises(ValueError, match=r"lm_head\.weight that differs from the embedding"):
            external.load_external_parameters(tmp_path / "out", abstract(MINISTRAL))

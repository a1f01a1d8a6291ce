"""PEFT directories, torch-free: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
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
from moe_train.mesh import make_mesh
from moe_train.model import transformer
from moe_train.model.lora import is_lora
from moe_train.weights import peft, safetensors_io, write

MIXTRAL = config.Model(
    family="mixtral",
    vocab_size=24,
    model_dim=8,
    num_layers=2,
    attention=config.Attention(num_heads=4, num_kv_heads=2, head_dim=6),
    ffn=config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2),
)
ONE = make_mesh(config.Mesh(), jax.devices()[:1])
EIGHT = make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2))


def lora_of(*targets: tuple[str, int, float]) -> config.Lora:
    return config.Lora(targets=tuple(config.LoraTarget(modules=(m,), rank=rank, alpha=alpha) for m, rank, alpha in targets))


def abstract(lora: config.Lora, dtype: str = "float32") -> dict[str, jax.ShapeDtypeStruct]:
    _, shapes = transformer.parameters(jax.eval_shape(lambda: transformer.init_model(0, MIXTRAL, config.Compute(), lora)))
    return {p: jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding) for p, like in shapes.items() if is_lora(p)}


def adapters(lora: config.Lora, dtype: str = "float32") -> dict[str, jax.Array]:
    mesh, draw = jax.sharding.get_mesh(), np.random.default_rng(0).normal
    return {
        path: jax.device_put(draw(0, 1, like.shape).astype(like.dtype), NamedSharding(mesh, like.sharding.spec))
        for path, like in abstract(lora, dtype).items()
    }


def settings_in(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


LORA = lora_of(("attention.q_proj", 2, 3.0), ("attention.o_proj", 3, 6.0), ("ffn.*_proj", 3, 6.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_read_back_bit_for_bit_on_any_mesh(dtype: str, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = adapters(LORA, dtype)
        report = peft.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", base_model="some/base")
    assert report["matrices"] == 2 * (2 + 3 * 4) and report["deltas_of_zero"] == 0
    read = peft.read_lora(tmp_path / "out", MIXTRAL)
    assert {(t.rank, t.alpha): set(t.modules) for t in read.targets} == {
        (2, 3.0): {"attention.q_proj"},
        (3, 6.0): {"attention.o_proj", "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"},
    }
    with jax.set_mesh(ONE):
        loaded = peft.load_adapter(tmp_path / "out", MIXTRAL, abstract(read, dtype))
    assert set(loaded) == set(parameters)
    for path, array in loaded.items():
        assert array.dtype == parameters[path].dtype and np.array_equal(np.asarray(array), np.asarray(parameters[path])), path


def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = adapters(LORA)
        peft.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", base_model="some/base", texts=write.Texts(config="a: 1\n"))
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "moe_train.yaml",
    ]
    settings = settings_in(tmp_path / "out")
    assert settings["target_modules"] == ["o_proj", "q_proj", "w1", "w2", "w3"]
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)
    assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({"q_proj": 2}, {"q_proj": 3})
    assert settings["base_model_name_or_path"] == "some/base"
    found = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w2"
    ours = "stacks.0.layers.0.ffn.down_proj"
    assert np.array_equal(found[f"{name}.lora_A.weight"], np.asarray(parameters[f"{ours}.lora_a"])[1, 2].T)
    assert np.array_equal(found[f"{name}.lora_B.weight"], np.asarray(parameters[f"{ours}.lora_b"])[1, 2].T)


def test_experts_come_with_all_three_matrices_and_one_rank(tmp_path: Path) -> None:
    lora = lora_of(("ffn.gate_proj", 3, 6.0), ("ffn.up_proj", 2, 3.0))
    with jax.set_mesh(ONE):
        report = peft.export_adapter(adapters(lora), MIXTRAL, lora, tmp_path / "out", base_model="b")
    assert report["deltas_of_zero"] == 2 * 4  # w2, which PEFT has to see
    (target,) = peft.read_lora(tmp_path / "out", MIXTRAL).targets
    assert (target.rank, target.alpha, set(target.modules)) == (3, 6.0, {"ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"})


def test_the_proof_finds_an_expert_whose_delta_was_dropped_or_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = safetensors_io.write_file
    victim = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w1.lora_B.weight"

    def planted(change: Callable[[Any, Any], np.ndarray]) -> Callable[..., None]:
        def faulty(file: Path, specs: list[safetensors_io.Spec], tensor: Any) -> None:
            write(file, specs, lambda spec: change(spec, tensor) if spec.name == victim else tensor(spec))

        return faulty

    zero = planted(lambda spec, tensor: np.zeros_like(tensor(spec)))
    swapped = planted(lambda spec, tensor: tensor(spec._replace(name=victim.replace("experts.3", "experts.0"))))
    with jax.set_mesh(ONE):
        for fault in (zero, swapped):
            monkeypatch.setattr(safetensors_io, "write_file", fault)
            with pytest.raises(
                RuntimeError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w1\.lora_A\.weight and its lora_B are not"
            ):
                peft.export_adapter(adapters(LORA), MIXTRAL, LORA, tmp_path / "out", base_model="b")
    assert not list(tmp_path.iterdir())


def test_a_model_without_adapter_has_none_to_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter to export"):
        peft.export_adapter({}, MIXTRAL, LORA, tmp_path / "out", base_model="b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is"),
    ],
)
def test_what_is_not_built_here_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        peft.export_adapter(adapters(LORA), MIXTRAL, LORA, tmp_path / "out", base_model="b")
    file = tmp_path / "out/adapter_config.json"
    file.write_text(json.dumps(settings_in(tmp_path / "out") | change))
    with pytest.raises(ValueError, match=message):
        peft.read_lora(tmp_path / "out", MIXTRAL)


def test_a_damaged_adapter_is_refused_in_one_line(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        peft.export_adapter(adapters(LORA), MIXTRAL, LORA, tmp_path / "out", base_model="b")
        weights = tmp_path / "out/adapter_model.safetensors"
        found = safetensors.numpy.load_file(weights)
        lost = next(name for name in found if "experts.3.w3" in name)
        safetensors.numpy.save_file({name: x for name, x in found.items() if name != lost}, weights)
        with pytest.raises(ValueError, match=f"lacks {lost}"):
            peft.load_adapter(tmp_path / "out", MIXTRAL, abstract(LORA))
        weights.write_bytes(weights.read_bytes()[:-5])
        with pytest.raises(ValueError, match="is truncated"):
            peft.load_adapter(tmp_path / "out", MIXTRAL, abstract(LORA))
        (tmp_path / "out/adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match="is not JSON"):
            peft.read_lora(tmp_path / "out", MIXTRAL)
        with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
            peft.read_lora(tmp_path, MIXTRAL)


def test_rank_stabilised_scales_are_read_as_what_they_are(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        peft.export_adapter(adapters(LORA), MIXTRAL, LORA, tmp_path / "out", base_model="b")
    (tmp_path / "out/adapter_config.json").write_text(json.dumps(settings_in(tmp_path / "out") | {"use_rslora": True}))
    alphas = {m: t.alpha for t in peft.read_lora(tmp_path / "out", MIXTRAL).targets for m in t.modules}
    assert alphas["attention.q_proj"] == pytest.approx(3.0 * 2**0.5)  # 3 / sqrt(2) = (3 sqrt(2)) / 2


def test_a_bfloat16_file_fills_float32_arrays(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = adapters(LORA, "bfloat16")
        peft.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", base_model="b")
        loaded = peft.load_adapter(tmp_path / "out", MIXTRAL, abstract(LORA))
    assert all(np.array_equal(np.asarray(x).astype(ml_dtypes.bfloat16), np.asarray(parameters[path])) for path, x in loaded.items())
    assert {x.dtype.name for x in loaded.values()} == {"float32"}

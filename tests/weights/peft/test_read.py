"""PEFT directories read: damaged ones are refused, and what is missing is padded with zeros."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_train.weights import peft
from tests.tiny import ONE
from tests.weights.peft.adapters import BY_EXPERT, LORA, MIXTRAL, abstract, adapters, settings_in, trained


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
    read = peft.read_lora(tmp_path / "out", MIXTRAL)
    (scale,) = (read.scale(t) for t in read.targets if "attention.q_proj" in t.modules)
    assert scale == pytest.approx(3.0 / 2**0.5)


def test_a_bfloat16_file_fills_float32_arrays(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = adapters(LORA, "bfloat16")
        peft.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", base_model="b")
        loaded = peft.load_adapter(tmp_path / "out", MIXTRAL, abstract(LORA))
    assert all(np.array_equal(np.asarray(x).astype(ml_dtypes.bfloat16), np.asarray(parameters[path])) for path, x in loaded.items())
    assert {x.dtype.name for x in loaded.values()} == {"float32"}


def test_a_file_with_some_experts_or_other_ranks_fills_zeros_up(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = trained(BY_EXPERT)
        peft.export_adapter(parameters, MIXTRAL, BY_EXPERT, tmp_path / "out", base_model="b")
        weights = tmp_path / "out/adapter_model.safetensors"
        found = safetensors.numpy.load_file(weights)
        small = {name: x for name, x in found.items() if "experts.1." not in name}
        for name in small:
            if "experts.3." in name:
                small[name] = np.ascontiguousarray(small[name][:2] if "lora_A" in name else small[name][:, :2])
        safetensors.numpy.save_file(small, weights)
        read = peft.read_lora(tmp_path / "out", MIXTRAL)
        assert {(t.rank, t.experts) for t in read.targets} == {(3, (0, 2)), (2, (3,))}
        like = trained(read)
        loaded = peft.load_adapter(tmp_path / "out", MIXTRAL, jax.eval_shape(lambda: like))
    for path, x in loaded.items():
        if path.endswith("lora_a"):
            assert np.array_equal(np.asarray(x), np.where(np.arange(4)[:, None, None] == 1, 0, np.asarray(parameters[path])))
    safetensors.numpy.save_file({name: x for name, x in small.items() if "layers.1." not in name}, weights)
    with pytest.raises(ValueError, match=r"experts\.0\.w1's are in 1 of 2 layers"):
        peft.read_lora(tmp_path / "out", MIXTRAL)


def test_a_module_to_save_without_a_weight_is_refused(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        peft.export_adapter(adapters(LORA), MIXTRAL, LORA, tmp_path / "out", base_model="b")
    file = tmp_path / "out/adapter_config.json"
    file.write_text(json.dumps(settings_in(tmp_path / "out") | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match=r"modules_to_save has 'lm_head', but adapter_model\.safetensors has no weight of it"):
        peft.read_lora(tmp_path / "out", MIXTRAL)

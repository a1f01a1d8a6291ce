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
from tests.weights.peft.adapters import BY_EXPERT, LORA, MIXTRAL, abstract, adapters, lora_of, settings_in, trained


def test_a_damaged_adapter_is_refused_in_one_line(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        peft.export_adapter(adapters(LORA), MIXTRAL, LORA, tmp_path / "out", base_model="b")
        weights = tmp_path / "out/adapter_model.safetensors"
        found = safetensors.numpy.load_file(weights)
        lost = next(name for name in found if "experts.3.w3" in name)
        safetensors.numpy.save_file({name: x for name, x in found.items() if name != lost}, weights)
        with pytest.raises(ValueError, match=f"lacks {lost}"):
            peft.load_adapter(tmp_path / "out", MIXTRAL, abstract(LORA))
        of_attention = {name: x for name, x in found.items() if "self_attn" in name}
        safetensors.numpy.save_file(of_attention, weights)
        stated = settings_in(tmp_path / "out")
        for changes, refusal in (
            ({"target_modules": ["k_proj"]}, "selects no module that .* adapts"),
            ({"target_parameters": ["input_layernorm.weight"]}, "target_parameters has 'input_layernorm.weight'; supported are"),
        ):
            (tmp_path / "out/adapter_config.json").write_text(json.dumps(stated | changes))
            with pytest.raises(ValueError, match=refusal):
                peft.read_lora(tmp_path / "out", MIXTRAL)
        (tmp_path / "out/adapter_config.json").write_text(json.dumps(stated))
        safetensors.numpy.save_file({n: x[:0] if "lora_A" in n else x[:, :0] for n, x in of_attention.items()}, weights)
        with pytest.raises(ValueError, match=r"lora_A\.weight has no numbers"):
            peft.read_lora(tmp_path / "out", MIXTRAL)
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
        with pytest.raises(ValueError, match=r"experts\.3\.w1\.lora_A\.weight has rank 2, but .* state 3 for it"):
            peft.read_lora(tmp_path / "out", MIXTRAL)
        settings = settings_in(tmp_path / "out") | {"rank_pattern": {r"experts\.3\.w[123]": 2}}
        (tmp_path / "out/adapter_config.json").write_text(json.dumps(settings))
        read = peft.read_lora(tmp_path / "out", MIXTRAL)
        assert {(t.rank, t.experts) for t in read.targets} == {(3, (0, 2)), (2, (3,))}
        like = trained(read)
        loaded = peft.load_adapter(tmp_path / "out", MIXTRAL, jax.eval_shape(lambda: like))
    for path, x in loaded.items():
        if path.endswith("lora_a"):
            assert np.array_equal(np.asarray(x), np.where(np.arange(4)[:, None, None] == 1, 0, np.asarray(parameters[path])))


def test_layers_may_have_other_ranks_scales_or_no_adapter(tmp_path: Path) -> None:
    """What a layer lacks is zeros in both factors; another scale is multiplied into B."""
    lora = lora_of(("attention.q_proj", 4, 8.0), ("ffn.*_proj", 2, 4.0))
    with jax.set_mesh(ONE):
        parameters = adapters(lora)
        peft.export_adapter(parameters, MIXTRAL, lora, tmp_path / "out", base_model="b")
        weights = tmp_path / "out/adapter_model.safetensors"
        files = safetensors.numpy.load_file(weights)
        for name in list(files):
            if "layers.1." in name and "experts" in name:
                del files[name]
            elif "layers.1." in name:
                files[name] = np.ascontiguousarray(files[name][:3] if "lora_A" in name else files[name][:, :3])
        safetensors.numpy.save_file(files, weights)
        patterns = {
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 4},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        }
        settings = settings_in(tmp_path / "out") | patterns | {"layers_to_transform": [0], "lora_alpha": 4}
        settings["alpha_pattern"]["q_proj"] = 8
        (tmp_path / "out/adapter_config.json").write_text(json.dumps(settings))
        read = peft.read_lora(tmp_path / "out", MIXTRAL)
        loaded = peft.load_adapter(tmp_path / "out", MIXTRAL, abstract(read))
    assert {target.modules[0]: (target.rank, target.alpha, target.experts) for target in read.targets} == {
        "attention.q_proj": (4, 8.0, None),
        "ffn.gate_proj": (2, 4.0, None),
    }
    path = "stacks.0.layers.0.attention.q_proj"
    a, b = (np.asarray(loaded[f"{path}.lora_{x}"]) for x in "ab")
    trained_a, trained_b = (np.asarray(parameters[f"{path}.lora_{x}"]) for x in "ab")
    np.testing.assert_array_equal(a[0], trained_a[0])
    np.testing.assert_array_equal(a[1], np.where(np.arange(4) < 3, trained_a[1], 0))
    np.testing.assert_allclose(b[1][:3], trained_b[1][:3] * 0.5)  # 3 / 3 instead of 8 / 4
    assert not b[1][3:].any()
    down = [np.asarray(loaded[f"stacks.0.layers.0.ffn.down_proj.lora_{x}"]) for x in "ab"]
    assert all(factor[0].any() and not factor[1].any() for factor in down)


def test_a_module_to_save_without_a_weight_is_refused(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        peft.export_adapter(adapters(LORA), MIXTRAL, LORA, tmp_path / "out", base_model="b")
    file = tmp_path / "out/adapter_config.json"
    file.write_text(json.dumps(settings_in(tmp_path / "out") | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match=r"modules_to_save has 'lm_head', but adapter_model\.safetensors has no weight of it"):
        peft.read_lora(tmp_path / "out", MIXTRAL)

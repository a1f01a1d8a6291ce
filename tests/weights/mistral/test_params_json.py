"""params.json both ways: released models, files that are not supported, and models that it cannot express."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.weights import external
from moe_train.weights.mistral import params_json
from tests.tiny import ATTENTION, DENSE, MIXTRAL, SIZES
from tests.weights.mistral.models import MODELS, YARN

PARAMS = params_json.write_model_config(MIXTRAL)


def read(params: Any, folder: Path) -> config.Model:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(params if isinstance(params, str) else json.dumps(params))
    return external.read_external_model(folder)


def test_the_files_of_released_models_are_understood(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fields as in Mistral 7B v0.1, Mixtral 8x7B, Ministral 8B and Ministral 3B."""
    size = {"dim": 64, "n_layers": 4, "head_dim": 16, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-05}
    size["vocab_size"] = 32000
    first = read({**size, "sliding_window": 4096, "rope_theta": 1e4}, tmp_path)
    assert (first.family, first.attention.windows, first.rope.theta) == ("mistral", (4096,), 1e4)
    moe = read({**size, "max_batch_size": 0, "moe": {"num_experts_per_tok": 2, "num_experts": 8}}, tmp_path)
    assert (moe.family, moe.rope.theta, moe.max_seq_len) == ("mixtral", 1e6, 128_000)
    window = [None, 32768]
    inter = read({**size, "rope_theta": 1e8, "_sliding_window": window * 2, "max_position_embeddings": 32768}, tmp_path)
    assert (inter.family, inter.attention.windows, inter.max_seq_len) == ("ministral", (None, 32768), 32768)
    yarn = {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}
    scaling = {"original_max_position_embeddings": 16384, "beta": 0.1}
    third = {
        "rope_theta": 1e6,
        "tied_embeddings": True,
        "yarn": yarn,
        "llama_4_scaling": scaling,
        "vision_encoder": {"image_size": 1540},
    }
    three = read({**size, **third, "max_position_embeddings": 262144}, tmp_path)
    assert three.family == "ministral3" and three.tie_embeddings and three.max_seq_len == 262144
    assert isinstance(three.rope, config.YarnRope) and (three.rope.mscale, three.rope.mscale_all_dim) == (1.0, 1.0)
    assert three.attention.query_scaling == config.QueryScaling(beta=0.1, original_max_seq_len=16384)
    assert not caplog.records
    read({**size, "rope_theta": 1e6, "new_field": 1}, tmp_path)
    assert "fields that are not read: new_field" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": None}, "dim: Input should be a valid integer"),
        ({"dim": "8"}, "dim: Input should be a valid integer"),
        ({"dim": True}, "dim: Input should be a valid integer"),
        ({"n_layers": 0}, "n_layers: Input should be greater than or equal to 1"),
        ({"norm_eps": -1}, "norm_eps: Input should be greater than 0"),
        ({"norm_eps": float("nan")}, "norm_eps: Input should be "),
        ({"n_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"moe": {"num_experts": 4}}, "moe.num_experts_per_tok: Field required"),
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 2, "capacity": 1}}, "moe.capacity: is not implemented"),
        (
            {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}},
            "moe.num_shared_experts is 1, which is supported only together with kv_lora_rank",
        ),
        (
            {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_expert_groups": 2}},
            "moe.num_expert_groups: Input should be 1",
        ),
        ({"moe": []}, "moe: Input should be "),
        ({"sliding_window": [4, None, 4]}, "sliding_window has 3 entries; n_layers 4 has to be a multiple of that"),
        ({"sliding_window": []}, "sliding_window has 0 entries"),
        ({"sliding_window": 4, "_sliding_window": 4}, "sliding_window and _sliding_window are both stated"),
        ({"sliding_window": 4, "rope_theta": None}, "rope_theta is not stated, and its default differs"),
        ({"yarn": {"factor": 2.0}}, "yarn.original_max_position_embeddings: Field required"),
        (
            {"quantization": {"qformat_weight": "int4"}},
            "quantization.qformat_weight is 'int4'; supported: 'fp8_e4m3'",
        ),
        ({"model_type": "mamba"}, "model_type is 'mamba', which is not implemented; it has to be 'transformer'"),
        ({"use_biases": True}, "use_biases is True"),
        ({"tied_embeddings": "yes"}, "tied_embeddings: Input should be a valid boolean"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_params_json_that_is_not_built_here_is_refused_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        read({**PARAMS, **change}, tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'params.json'}: ") and said in message and "\n" not in message


def test_a_params_json_that_is_none_is_refused(tmp_path: Path) -> None:
    for text, said in (
        ("", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{" * 10_000, "is not JSON"),
        ("{}", "dim: Field required"),
    ):
        with pytest.raises(ValueError, match=said):
            read(text, tmp_path)


def test_what_params_json_has_no_words_for_is_refused() -> None:
    model = MODELS["ministral3"]
    uneven = model.model_copy(update={"rope": YARN.model_copy(update={"mscale": 0.7})})
    with pytest.raises(ValueError, match=r"rope\.mscale 0\.7 and rope\.mscale_all_dim 1\.0 differ"):
        params_json.write_model_config(uneven)


def test_families_that_mean_the_same_are_read_as_one(tmp_path: Path) -> None:
    llama = config.Model(family="llama", attention=ATTENTION, ffn=DENSE, init_stddev=0.1, **SIZES)
    written = params_json.as_written(llama)
    assert read(params_json.write_model_config(llama), tmp_path) == written
    assert (written.family, written.init_stddev) == ("mistral", 0.02)
    halves = YARN.model_copy(update={"mscale": 0.5, "mscale_all_dim": 0.5})
    same = MODELS["ministral3"].model_copy(update={"rope": halves})  # 0.5 over 0.5 is 1, too
    assert params_json.as_written(same) == MODELS["ministral3"]

"""Latent attention as transformers computes it: logits, gradients and exports of Mistral 4 and DeepSeek-V3, both scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.weights import external, names
from moe_train.weights.serve import auto_class_of

pytestmark = pytest.mark.judges

# Dense first layer, two shared experts, norms whose hard-wired epsilon of 1e-6 shows beside 1e-3, five original lengths.
SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 3},
    **{"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8, "v_head_dim": 6, "qk_nope_head_dim": 10},
    **{"first_k_dense_replace": 1, "rms_norm_eps": 1e-3, "max_position_embeddings": 128, "pad_token_id": None},
    "routed_scaling_factor": 1.7,
}
YARN: dict[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8},
    **{"beta_fast": 2.0, "beta_slow": 0.5},
}
CORRECTED = {"mscale": 1.0, "mscale_all_dim": 1.0}
BASE_SCALE = {"mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": 1.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral4": ("mistral4", {"llama_4_scaling_beta": 0.1, **CORRECTED}, {"n_group": 1, "topk_group": 1}),
    "mistral4, base scale": ("mistral4", {"llama_4_scaling_beta": 0.1, **BASE_SCALE}, {"n_group": 1, "topk_group": 1}),
    "mistral4, direct queries": (
        "mistral4",
        {"llama_4_scaling_beta": 0.0, **CORRECTED},
        {"n_group": 1, "topk_group": 1, "q_lora_rank": None},
    ),
    "deepseek_v3": ("deepseek_v3", CORRECTED, {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}),
    "deepseek_v3, groups, base scale": ("deepseek_v3", BASE_SCALE, {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0}),
}
SEGMENTS = np.stack([np.repeat([1, 2, 0], [21, 14, 5]), np.ones(40, int)]).astype(np.int32)
ONE = config.Mesh()
EIGHT = config.Mesh(expert=2, context=2, tensor=2)


def judge_of(case: str) -> Any:
    """A transformers model of normal weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family, rope, more = CASES[case]
    settings = transformers.AutoConfig.for_model(family, **{**SIZES, **more}, rope_parameters={**YARN, **rope})
    classes = {"mistral4": "Mistral4ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
    model = getattr(transformers, classes[family])._from_config(settings, attn_implementation="eager").eval()
    biases = [(name, buffer) for name, buffer in model.named_buffers() if "correction_bias" in name]
    for name, parameter in [*model.named_parameters(), *biases]:
        parameter.data.normal_(0, 0.3)
        if "norm" in name:
            parameter.data.mul_(2 / 3).add_(1)
    return model


def documents() -> list[tuple[int, np.ndarray]]:
    """(row, columns) of each document."""
    return [(row, np.flatnonzero(SEGMENTS[row] == s)) for row, s in ((0, 1), (0, 2), (1, 1))]


def batch(mesh: Any) -> tuple[np.ndarray, Any]:
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], SEGMENTS.shape).astype(np.int32)
    positions = np.zeros_like(SEGMENTS)
    for row, columns in documents():
        positions[row, columns] = np.arange(len(columns))
    return tokens, put_batch((tokens, positions, SEGMENTS), mesh)


def distance(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual), np.asarray(expected)
    if not expected.any():  # the gradient of an expert that no token uses
        return float(np.abs(actual).max())
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def gradients_and_logits(structure: Any, weights: Any, tokens: np.ndarray, arrays: Any) -> Any:
    bears_loss = (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] > 0)

    def loss(weights: Any) -> Any:
        module = flat.combine(structure, weights)
        logits = jax.sharding.reshard(module.logits(module(*arrays)[0]), jax.P())
        scores = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.sum(scores * jax.nn.one_hot(tokens[:, 1:], scores.shape[-1]), axis=-1)
        return -jnp.sum(chosen * bears_loss) / bears_loss.sum(), logits

    return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(weights))


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        *(pytest.param(case, EIGHT, id=f"{case}-eight devices") for case in CASES),
        *(pytest.param(case, ONE, id=f"{case}-one device") for case in ("mistral4", "deepseek_v3")),
        *(pytest.param(case, ONE, id=f"{case}-one device", marks=pytest.mark.slow) for case in CASES if "," in case),
    ],
)
def test_logits_and_gradients_equal_transformers(case: str, sizes: config.Mesh, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    judge = judge_of(case)
    judge.save_pretrained(tmp_path)
    model = external.read_external_model(tmp_path)
    mesh = make_mesh(sizes, jax.devices()[: 1 if sizes is ONE else 8])
    with jax.set_mesh(mesh):
        structure, shapes = flat.parameters(transformer.abstract_model(model, config.Compute()))
        weights = external.load_external_parameters(tmp_path, shapes)
        tokens, arrays = batch(mesh)
        gradients, logits = gradients_and_logits(structure, weights, tokens, arrays)
    total, count = 0.0, 0
    for row, columns in documents():  # each on its own: nothing to see of the others
        text = torch.tensor(tokens[row, columns]).long()[None]
        theirs = judge(text).logits
        assert distance(logits[row, columns], theirs[0].detach()) < 1e-4
        total += torch.nn.functional.cross_entropy(theirs[0, :-1], text[0, 1:], reduction="sum")
        count += len(columns) - 1
    (total / count).backward()
    state = dict(judge.named_parameters())
    in_memory = names.weight_pieces(model, names.hugging_face(experts="fused"))
    for piece in in_memory:
        if piece.name not in state:
            assert piece.name.endswith("e_score_correction_bias")  # has no gradient
            continue
        expected = state[piece.name].grad.numpy()[tuple(at if isinstance(at, int) else slice(*at) for at in piece.part)]
        assert distance(piece.to_file(gradients[piece.path][piece.lead]), expected) < 1e-3, piece.name
    assert set(state) <= {piece.name for piece in in_memory}


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_an_export(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    judge_of(case).save_pretrained(tmp_path / "base")
    model = external.read_external_model(tmp_path / "base")
    mesh = make_mesh(ONE, jax.devices()[:1])
    with jax.set_mesh(mesh):
        structure, shapes = flat.parameters(transformer.abstract_model(model, config.Compute()))
        draw = np.random.default_rng(1).normal
        weights = {}
        for path, like in shapes.items():
            values = draw(path.endswith("scale"), 0.3, like.shape).astype(like.dtype)
            weights[path] = jax.device_put(values, NamedSharding(mesh, like.sharding.spec))
        tokens, arrays = batch(mesh)
        _, logits = gradients_and_logits(structure, weights, tokens, arrays)
        options = write_and_prove.WriteOptions(dtype="float32", depth="tensors", max_shard_bytes=20_000)
        write_and_prove.export_model(weights, model, tmp_path / "export", options)
    loader = getattr(transformers, auto_class_of(model))
    judge, report = loader.from_pretrained(
        tmp_path / "export", output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(report.values()), report
    for row, columns in documents():
        theirs = judge.eval()(torch.tensor(tokens[row, columns]).long()[None]).logits[0].detach()
        assert distance(logits[row, columns], theirs) < 1e-4

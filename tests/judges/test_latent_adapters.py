"""PEFT as the judge of adapters of latent attention and shared experts, on transformers' Mistral 4 and DeepSeek V3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import Parameters, combine, parameters
from moe_train.model.transformer import abstract_model
from moe_train.proof.base_modules import check_adapter_names, exported_modules
from moe_train.proof.checks import Fault
from moe_train.weights import names, peft, safetensors_files
from moe_train.weights.arrays import fetch_entry
from tests.compiled_programs import quick_jit
from tests.random_parameters import abstract, random_parameters
from tests.tiny import ONE
from tests.weights.mistral.models import MISTRAL4

pytestmark = pytest.mark.judges

LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.q_*", "attention.kv_*"), rank=2, alpha=3.0),
        config.LoraTarget(modules=("attention.o_proj", "ffn.shared.*"), rank=3, alpha=6.0),
        config.LoraTarget(modules=("head",), rank=3, alpha=5.0),
    )
)
TOKENS = np.random.default_rng(0).integers(0, MISTRAL4.vocab_size, (1, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def weights() -> Parameters:
    with jax.set_mesh(ONE):
        return random_parameters(MISTRAL4, lora=LORA, scale=0.2)


def judge(weights: Parameters) -> Any:
    """transformers' model with the base's weights, which computes the softmax scale of the config."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    attention = MISTRAL4.attention
    ffn = MISTRAL4.ffn
    rope = MISTRAL4.rope
    assert isinstance(attention, config.MultiHeadLatentAttention) and isinstance(ffn, config.MoeFfn)
    assert isinstance(rope, config.YarnRope) and ffn.dense_layers is not None and attention.query_scaling is not None
    settings = transformers.Mistral4Config(
        vocab_size=MISTRAL4.vocab_size,
        hidden_size=MISTRAL4.model_dim,
        intermediate_size=ffn.dense_layers.ffn_dim,
        moe_intermediate_size=ffn.ffn_dim,
        num_hidden_layers=MISTRAL4.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        n_shared_experts=ffn.num_shared_experts,
        n_routed_experts=ffn.num_experts,
        num_experts_per_tok=ffn.experts_per_token,
        routed_scaling_factor=ffn.router.scale,
        first_k_dense_replace=ffn.dense_layers.count,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        n_group=1,
        topk_group=1,
        rms_norm_eps=MISTRAL4.norm_eps,
        max_position_embeddings=MISTRAL4.max_seq_len,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_seq_len,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": 0.0,
            "mscale_all_dim": 0.0,
            "attention_factor": 1.0,
            "llama_4_scaling_beta": attention.query_scaling.beta,
        },
    )
    torch.set_num_threads(1)
    model = transformers.Mistral4ForCausalLM._from_config(settings, attn_implementation="eager").eval()
    state = model.state_dict()
    for piece in names.weight_pieces(MISTRAL4):
        part = tuple(at if isinstance(at, int) else slice(*at) for at in piece.part)
        values = piece.to_file(fetch_entry(weights[piece.path], piece.lead))
        state[piece.name][part or ...] = torch.tensor(np.ascontiguousarray(values))
    return model


def our_logits(weights: Parameters, lora: config.Lora | None) -> np.ndarray:
    with jax.set_mesh(ONE):
        structure, _ = parameters(abstract_model(MISTRAL4, config.Compute(), lora))
        arrays = put_batch((TOKENS, np.arange(20, dtype=np.int32)[None], np.ones_like(TOKENS)), ONE)

        @quick_jit
        def run(weights: Parameters) -> jax.Array:
            module = combine(structure, weights)
            return module.logits(module(*arrays)[0])

        return np.asarray(run(weights))


def logits_of(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_peft_applies_an_adapter_and_writes_one_that_is_read(weights: Parameters, tmp_path: Path) -> None:
    library = pytest.importorskip("peft")
    base = {path: x for path, x in weights.items() if ".lora_" not in path}
    theirs = judge(base)
    assert distance(our_logits(base, None), logits_of(theirs)) < 1e-4
    peft.export_adapter(weights, MISTRAL4, LORA, tmp_path / "out", base_model="b")
    adapted = library.PeftModel.from_pretrained(theirs, tmp_path / "out")
    ours = our_logits(weights, LORA)
    assert distance(ours, logits_of(adapted)) < 1e-4
    assert distance(ours, our_logits(base, None)) > 1e-2
    # No other module got an adapter, such as the dense first layer, whose matrices have the names of the shared experts'.
    written = safetensors_files.open_safetensors(tmp_path / "out/adapter_model.safetensors")
    assert sum(".lora_" in name for name, _ in adapted.named_parameters()) == len(written) == 2 * (4 * 5 + 3 * 3 + 1)
    adapted.save_pretrained(tmp_path / "theirs")
    read = peft.read_lora(tmp_path / "theirs", MISTRAL4)
    with jax.set_mesh(ONE):
        like = {path: x for path, x in abstract(MISTRAL4, lora=read).items() if ".lora_" in path}
        loaded = peft.load_adapter(tmp_path / "theirs", MISTRAL4, like)
    assert loaded.keys() == {path for path in weights if ".lora_" in path}
    assert distance(our_logits({**base, **loaded}, read), ours) < 1e-5


def test_the_proof_finds_names_that_select_the_dense_layer_too(weights: Parameters, tmp_path: Path) -> None:
    peft.export_adapter(weights, MISTRAL4, LORA, tmp_path / "out", base_model="b")
    settings = peft.read_settings(tmp_path / "out")
    written = safetensors_files.open_safetensors(tmp_path / "out/adapter_model.safetensors")
    modules = exported_modules(MISTRAL4)
    assert check_adapter_names(written, settings, modules).metrics["count"] == len(written) // 2
    targets = [name.rpartition(".")[2] for name in settings["target_modules"]]
    with pytest.raises(Fault, match=r"also selects model\.layers\.0\.mlp"):
        check_adapter_names(written, {**settings, "target_modules": targets}, modules)

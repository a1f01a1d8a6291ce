"""mistral-inference as the judge: its own loader, its own layers, its own way with adapters.

Its attention kernel (xformers) has no CPU form; here the kernel alone, softmax(q·k + mask)·v, is torch's. The mask is
xformers' own, laid out densely. Runs where mistral-inference is installed: `pip install --no-deps mistral-inference
xformers simple-parsing docstring-parser` beside torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.weights.mistral import lora as mistral_lora
from tests.random_parameters import random_parameters
from tests.tiny import LORA, MIXTRAL, ONE
from tests.weights.mistral.models import MODELS, write

pytestmark = pytest.mark.judges

TOKENS = np.random.default_rng(2).integers(0, MIXTRAL.vocab_size, 24)


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("mistral_inference", exc_type=ImportError)
    from mistral_inference import cache, transformer_layers
    from mistral_inference import transformer as native

    def kernel(q: Any, k: Any, v: Any, mask: Any) -> Any:  # (1, T, N, H)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bias = mask.materialize((1, 1, q.shape[2], k.shape[2]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    monkeypatch.setattr(transformer_layers, "memory_efficient_attention", kernel)

    def load(folder: Path, adapter: Path | None = None) -> np.ndarray:
        """Logits of TOKENS, of a model with an adapter merged."""
        model = native.Transformer.from_folder(folder, device="cpu", dtype=torch.float32)
        if adapter is not None:
            model.load_lora(adapter / mistral_lora.LORA_FILE)  # scaling 2.0, its default
        args = model.args
        size = (args.n_layers, 1, len(TOKENS), args.n_kv_heads, args.head_dim, args.sliding_window)
        with torch.no_grad():
            return model(torch.tensor(TOKENS), [len(TOKENS)], cache.BufferCache(*size)).numpy()

    return load


def our_logits(parameters: dict[str, jax.Array], model: config.Model, lora: config.Lora | None = None) -> np.ndarray:
    abstract = transformer.abstract_model(model, config.Compute(), lora)
    structure, _ = flat.parameters(abstract)
    batch = put_batch((TOKENS[None], np.arange(len(TOKENS))[None], np.ones((1, len(TOKENS)), int)), ONE)

    def logits(parameters: dict[str, jax.Array]) -> jax.Array:
        module = flat.combine(structure, parameters)
        return module.logits(module(*batch)[0])

    return np.asarray(jax.jit(logits)(parameters))[0]


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


@pytest.mark.parametrize("name", ["mixtral", "mistral", "ministral"])
def test_logits_equal_mistral_inferences(name: str, inference: Any, tmp_path: Path) -> None:
    model = MODELS[name]
    with jax.set_mesh(ONE):
        parameters = {path: array * 3 for path, array in random_parameters(model).items()}
        ours = our_logits(parameters, model)
    assert_close(ours, inference(write(parameters, model, tmp_path / "out")))


def test_an_adapter_on_attention_and_experts_gives_our_logits(inference: Any, tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = {path: array * 3 for path, array in random_parameters(MIXTRAL, lora=LORA).items()}
        mistral_lora.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "adapter", dtype="float32")
        base = {path: array for path, array in parameters.items() if not path.endswith((".lora_a", ".lora_b"))}
        folder = write(base, MIXTRAL, tmp_path / "base")
        theirs = inference(folder, tmp_path / "adapter")
        assert_close(our_logits(parameters, MIXTRAL, LORA), theirs)
    assert np.abs(theirs - inference(folder)).max() > 0.1


def test_a_model_with_its_tied_output_left_out_is_none_that_mistral_inference_loads(inference: Any, tmp_path: Path) -> None:
    """It has no word for tied embeddings; vLLM has."""
    with jax.set_mesh(ONE):
        folder = write(random_parameters(MODELS["ministral3"]), MODELS["ministral3"], tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"Missing key.*output\.weight"):
        inference(folder)

"""transformers as the judge, on CPU torch in float32: logits, gradients, exports and adapters of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.mesh import make_mesh, put_batch
from moe_train.model import transformer
from moe_train.weights import foreign, names, peft, write

pytestmark = pytest.mark.judges

# head_dim 24 is not model_dim / num_heads; 4 heads share 2 kv heads
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
    "pad_token_id": None,  # torch gives a padding token's embedding no gradient
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
KINDS = ["full_attention", "sliding_attention"] * 2
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "mistral": {"sliding_window": 5},
    "ministral": {"num_hidden_layers": 4, "sliding_window": 5, "layer_types": KINDS},
    "ministral3": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
}
# Two packed documents and padding; a full row. Longer than a block of the CPU's attention (64)
SEGMENTS = np.stack([np.repeat([1, 2, 0], [43, 27, 10]), np.ones(80, int)])


def settings_of(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))


def random_judge(family: str) -> Any:
    """A transformers model of normal weights, large enough that positions, windows and experts matter."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = settings_of(family)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def load(directory: Path) -> tuple[config.Model, Any, dict[str, jax.Array]]:
    model = foreign.read_model(directory)
    abstract = jax.eval_shape(lambda: transformer.init_model(0, model, config.Compute()))
    structure, shapes = transformer.parameters(abstract)
    return model, structure, foreign.load_parameters(directory, shapes)


def batch(mesh: jax.sharding.Mesh) -> tuple[np.ndarray, Any]:
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], SEGMENTS.shape)
    positions = np.zeros_like(SEGMENTS)
    for row, document in documents():
        positions[row, document] = np.arange(len(document))
    return tokens, put_batch((tokens, positions, SEGMENTS), mesh)


def documents() -> list[tuple[int, np.ndarray]]:
    """(row, columns) of each document."""
    return [(row, np.flatnonzero(SEGMENTS[row] == s)) for row in range(len(SEGMENTS)) for s in (1, 2) if s in SEGMENTS[row]]


def distance(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(config.Mesh(), jax.devices()[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    judge = random_judge(family)
    judge.save_pretrained(tmp_path / "model")
    with jax.set_mesh(mesh):
        model, structure, parameters = load(tmp_path / "model")
        tokens, arrays = batch(mesh)

        def loss(parameters: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            module = transformer.combine(structure, parameters)
            logits = module.logits(module(*arrays)[0])
            # the next token of the same document
            scores = jax.nn.log_softmax(logits[:, :-1])
            chosen = jnp.sum(scores * jax.nn.one_hot(tokens[:, 1:], scores.shape[-1]), axis=-1)
            bears_loss = (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] > 0)
            return -jnp.sum(chosen * bears_loss) / bears_loss.sum(), logits

        gradients, logits = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(parameters))

    torch = pytest.importorskip("torch")
    total, count = 0.0, 0
    for row, columns in documents():  # each on its own: nothing to see of the others
        text = torch.tensor(tokens[row, columns])[None]
        theirs = judge(text).logits
        assert distance(logits[row, columns], theirs[0].detach()) < 1e-4
        total += torch.nn.functional.cross_entropy(theirs[0, :-1], text[0, 1:], reduction="sum")
        count += len(columns) - 1
    (total / count).backward()
    state = dict(judge.named_parameters())
    table = names.pieces(model, names.hugging_face(fused=True))
    assert {piece.name for piece in table} == set(state)
    for piece in table:
        ours = piece.to_file(gradients[piece.path][piece.lead])
        theirs = state[piece.name].grad.numpy()[tuple(at if isinstance(at, int) else slice(*at) for at in piece.part)]
        assert distance(ours, theirs) < 1e-3, (piece.name, piece.part)


def random_parameters(model: config.Model, lora: config.Lora | None = None) -> tuple[Any, dict[str, jax.Array]]:
    """Structure and normal weights, the adapters' B included."""
    structure, parameters = transformer.parameters(transformer.init_model(0, model, config.Compute(), lora))
    draw = np.random.default_rng(1).normal
    return structure, {path: jax.device_put(draw(0, 0.2, x.shape).astype(np.float32), x.sharding) for path, x in parameters.items()}


def our_logits(structure: Any, parameters: dict[str, jax.Array], arrays: Any) -> np.ndarray:
    @jax.jit
    def run(parameters: dict[str, jax.Array]) -> jax.Array:
        module = transformer.combine(structure, parameters)
        return module.logits(module(*arrays)[0])

    return np.asarray(run(parameters))


def assert_same_logits(judge: Any, ours: np.ndarray, tokens: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    for row, columns in documents():
        with torch.no_grad():
            theirs = judge(torch.tensor(tokens[row, columns])[None]).logits[0]
        assert distance(ours[row, columns], theirs) < 1e-4


def read_by_transformers(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    judge, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(found.values()), found
    return judge.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_an_export(family: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    settings = settings_of(family)
    settings.architectures = [f"{settings.model_type.capitalize()}ForCausalLM"]
    settings.save_pretrained(tmp_path)
    model = foreign.read_model(tmp_path)
    with jax.set_mesh(mesh):
        structure, parameters = random_parameters(model)
        tokens, arrays = batch(mesh)
        ours = our_logits(structure, parameters, arrays)
        write.export(parameters, model, tmp_path / "export", dtype="float32", max_shard_bytes=20_000)
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 2
    assert_same_logits(read_by_transformers(tmp_path / "export"), ours, tokens)


LORAS = {
    "everything": [("attention.*", 4, 8.0), ("ffn.*", 4, 8.0)],
    "ranks that differ": [
        ("attention.[qk]_proj", 6, 9.0),
        ("attention.o_proj", 2, 4.0),
        ("ffn.[gu]*", 4, 8.0),
        ("ffn.down_proj", 2, 7.5),
    ],
    "gate without up": [("ffn.gate_proj", 4, 8.0), ("attention.q_proj", 2, 3.0)],
    "gate and up that differ": [("ffn.gate_proj", 4, 8.0), ("ffn.up_proj", 2, 3.0)],
    "down alone": [("ffn.down_proj", 4, 8.0)],
    "attention alone": [("attention.v_proj", 4, 8.0)],
}


@pytest.mark.parametrize(("family", "targets"), [*(("mixtral", name) for name in LORAS), ("ministral", "ranks that differ")])
def test_peft_and_transformers_read_an_adapter(family: str, targets: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    PeftModel = pytest.importorskip("peft").PeftModel
    random_judge(family).save_pretrained(tmp_path / "base")
    lora = config.Lora(targets=tuple(config.LoraTarget(modules=(m,), rank=r, alpha=alpha) for m, r, alpha in LORAS[targets]))
    with jax.set_mesh(mesh):
        model, _, base = load(tmp_path / "base")
        structure, adapters = random_parameters(model, lora)
        parameters = adapters | base
        tokens, arrays = batch(mesh)
        ours = our_logits(structure, parameters, arrays)
        write.export(parameters, model, tmp_path / "merged", dtype="float32", lora=lora, merge=True)
        peft.export_adapter(parameters, model, lora, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert_same_logits(read_by_transformers(tmp_path / "merged"), ours, tokens)
    judge = read_by_transformers(tmp_path / "base")
    with pytest.raises(AssertionError):
        assert_same_logits(judge, ours, tokens)  # the adapter matters
    judge = PeftModel.from_pretrained(judge, tmp_path / "adapter").eval()
    assert_same_logits(judge, ours, tokens)
    assert_same_logits(judge.merge_and_unload(), ours, tokens)

"""transformers as the judge, on CPU torch in float32: logits, gradients, exports and adapters of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model import lora as lora_module
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.model.paths import ParameterPath
from moe_train.weights import external, names, peft

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
    model = external.read_external_model(directory)
    abstract = transformer.abstract_model(model, config.Compute())
    structure, shapes = flat.parameters(abstract)
    return model, structure, external.load_external_parameters(directory, shapes)


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
            module = flat.combine(structure, parameters)
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
    table = names.weight_pieces(model, names.hugging_face(experts="fused"))
    assert {piece.name for piece in table} == set(state)
    for piece in table:
        ours = piece.to_file(gradients[piece.path][piece.lead])
        theirs = state[piece.name].grad.numpy()[tuple(at if isinstance(at, int) else slice(*at) for at in piece.part)]
        assert distance(ours, theirs) < 1e-3, (piece.name, piece.part)


def random_parameters(model: config.Model, lora: config.Lora | None = None) -> tuple[Any, dict[str, jax.Array]]:
    """Structure and normal weights, the adapters' B included."""
    structure, parameters = flat.parameters(transformer.init_model(0, model, config.Compute(), lora))
    draw = np.random.default_rng(1).normal
    return structure, {path: jax.device_put(draw(0, 0.2, x.shape).astype(np.float32), x.sharding) for path, x in parameters.items()}


def our_logits(structure: Any, parameters: dict[str, jax.Array], arrays: Any) -> np.ndarray:
    @jax.jit
    def run(parameters: dict[str, jax.Array]) -> jax.Array:
        module = flat.combine(structure, parameters)
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
    model = external.read_external_model(tmp_path)
    with jax.set_mesh(mesh):
        structure, parameters = random_parameters(model)
        tokens, arrays = batch(mesh)
        ours = our_logits(structure, parameters, arrays)
        write_and_prove.export_model(
            parameters, model, tmp_path / "export", write_and_prove.WriteOptions(dtype="float32", max_shard_bytes=20_000)
        )
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 2
    assert_same_logits(read_by_transformers(tmp_path / "export"), ours, tokens)


def lora_of(*targets: tuple[str, int, float], **more: Any) -> config.Lora:
    return config.Lora(targets=tuple(config.LoraTarget(modules=(m,), rank=r, alpha=alpha) for m, r, alpha in targets), **more)


BY_EXPERT = (
    config.LoraTarget(modules=("ffn.*",), rank=4, alpha=8.0, experts=(0, 2)),
    config.LoraTarget(modules=("ffn.gate_proj", "ffn.down_proj"), rank=2, alpha=1.5, experts=(3,)),
    config.LoraTarget(modules=("attention.q_proj",), rank=3, alpha=8.0),
)
LORAS = {
    "everything": lora_of(("attention.*", 4, 8.0), ("ffn.*", 4, 8.0)),
    "ranks that differ": lora_of(
        ("attention.[qk]_proj", 6, 9.0), ("attention.o_proj", 2, 4.0), ("ffn.[gu]*", 4, 8.0), ("ffn.down_proj", 2, 7.5)
    ),
    "gate without up": lora_of(("ffn.gate_proj", 4, 8.0), ("attention.q_proj", 2, 3.0)),
    "gate and up that differ": lora_of(("ffn.gate_proj", 4, 8.0), ("ffn.up_proj", 2, 3.0)),
    "down alone": lora_of(("ffn.down_proj", 4, 8.0)),
    "attention alone": lora_of(("attention.v_proj", 4, 8.0)),
    "experts that differ": config.Lora(targets=BY_EXPERT, rslora=True),
    "both ends and the router": lora_of(("embed", 4, 3.0), ("head", 2, 3.0), ("ffn.router", 2, 4.0), ("ffn.*", 4, 8.0)),
    "modules in full": lora_of(("attention.q_proj", 4, 3.0), train=("*_norm", "ffn.router", "embed", "head", "attention.v_proj")),
    "both ends, rank-stabilised": lora_of(("embed", 4, 3.0), ("head", 2, 3.0), ("ffn.*", 3, 4.0), rslora=True, dropout=0.1),
    "modules in full, tied": lora_of(("attention.q_proj", 4, 3.0), train=("*_norm", "embed", "ffn.up_proj")),
}
OF_FAMILY = {
    "mixtral": [name for name in LORAS if "tied" not in name],
    "ministral": ["ranks that differ", "both ends, rank-stabilised"],
    "llama": ["modules in full, tied"],
}


@pytest.mark.parametrize(("family", "adapters"), [(family, name) for family, names in OF_FAMILY.items() for name in names])
def test_peft_and_transformers_read_an_adapter(family: str, adapters: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    PeftModel = pytest.importorskip("peft").PeftModel
    random_judge(family).save_pretrained(tmp_path / "base")
    lora = LORAS[adapters]
    with jax.set_mesh(mesh):
        model, _, base = load(tmp_path / "base")
        structure, random = random_parameters(model, lora)
        parameters = base | {
            path: without_padding(path, x, lora) for path, x in random.items() if ParameterPath.parse(path).is_trained(lora)
        }
        tokens, arrays = batch(mesh)
        ours = our_logits(structure, parameters, arrays)
        write_and_prove.export_model(
            parameters, model, tmp_path / "merged", write_and_prove.WriteOptions(dtype="float32", lora=lora, merge=True)
        )
        peft.export_adapter(parameters, model, lora, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert_same_logits(read_by_transformers(tmp_path / "merged"), ours, tokens)
    judge = read_by_transformers(tmp_path / "base")
    with pytest.raises(AssertionError):
        assert_same_logits(judge, ours, tokens)  # the adapter matters
    judge = PeftModel.from_pretrained(judge, tmp_path / "adapter").eval()
    assert_same_logits(judge, ours, tokens)
    assert_same_logits(judge.merge_and_unload(), ours, tokens)


def without_padding(path: str, x: jax.Array, lora: config.Lora) -> jax.Array:
    """Zeros past an expert's own rank, as training leaves them."""
    targets = lora.targets_of(ParameterPath.parse(path).module)
    if ".lora_" not in path or all(target.experts is None for target in targets):
        return x
    values = np.array(x)
    for e in range(x.shape[1]):
        rank = lora_module.scale_of_expert(lora, targets, e)[1]
        values[(slice(None), e, ..., slice(rank, None)) if path.endswith("_a") else (slice(None), e, slice(rank, None))] = 0
    return jax.device_put(values, x.sharding)


WRITTEN_BY_PEFT: dict[str, dict[str, Any]] = {
    "mixtral": {"target_modules": ["q_proj", "o_proj", "lm_head", "gate"], "modules_to_save": ["input_layernorm", "model.norm"]},
    "mixtral, all linear": {"target_modules": "all-linear"},
    "mixtral, experts": {"target_modules": ["w1", "w2", "w3"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    "mixtral, one matrix": {"target_modules": ["w2", "v_proj"], "use_rslora": True},
    "mixtral, parameters": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
        "alpha_pattern": {"gate.weight": 3, "gate_up_proj": 5},
    },
    "ministral": {
        "target_modules": ["v_proj", "down_proj", "embed_tokens", "lm_head"],
        "rank_pattern": {"v_proj": 6},
        "alpha_pattern": {"down_proj": 5},
        "use_rslora": True,
        "lora_dropout": 0.1,
    },
    "llama": {"target_modules": ["k_proj", "gate_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("settings", WRITTEN_BY_PEFT)
def test_an_adapter_that_peft_wrote_is_read(settings: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    judges, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    judge = random_judge(settings.split(",")[0])
    judge.save_pretrained(tmp_path / "base")
    section = judges.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **WRITTEN_BY_PEFT[settings])
    judge = judges.get_peft_model(judge, section).eval()
    torch.manual_seed(1)
    for parameter in judge.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    judge.save_pretrained(tmp_path / "adapter")
    with jax.set_mesh(mesh):
        tokens, arrays = batch(mesh)
        ours = logits_with_adapter(tmp_path / "base", tmp_path / "adapter", arrays)
    assert_same_logits(judge, ours, tokens)


def logits_with_adapter(base_directory: Path, adapter: Path, arrays: Any) -> np.ndarray:
    """Logits of a base with an adapter, both read from files."""
    model, _, base = load(base_directory)
    lora = peft.read_lora(adapter, model)
    structure, shapes = flat.parameters(transformer.abstract_model(model, config.Compute(), lora))
    wanted = {path: like for path, like in shapes.items() if ParameterPath.parse(path).is_trained(lora)}
    return our_logits(structure, base | peft.load_adapter(adapter, model, wanted), arrays)


@pytest.mark.parametrize("adapters", OF_FAMILY["mixtral"])
def test_our_adapter_is_read_after_a_round_through_peft(adapters: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    PeftModel = pytest.importorskip("peft").PeftModel
    random_judge("mixtral").save_pretrained(tmp_path / "base")
    with jax.set_mesh(mesh):
        model, _, base = load(tmp_path / "base")
        lora = LORAS[adapters]
        structure, random = random_parameters(model, lora)
        trained = {path: without_padding(path, x, lora) for path, x in random.items() if ParameterPath.parse(path).is_trained(lora)}
        peft.export_adapter(base | trained, model, lora, tmp_path / "adapter", base_model=str(tmp_path / "base"))
        judge = PeftModel.from_pretrained(read_by_transformers(tmp_path / "base"), tmp_path / "adapter").eval()
        judge.save_pretrained(tmp_path / "again")
        tokens, arrays = batch(mesh)
        ours = our_logits(structure, base | trained, arrays)
        again = logits_with_adapter(tmp_path / "base", tmp_path / "again", arrays)
    assert distance(again, ours) < 1e-4
    assert_same_logits(judge, again, tokens)


def test_an_end_that_peft_untied_is_refused(mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    judges = pytest.importorskip("peft")
    judge = random_judge("llama")
    judge.save_pretrained(tmp_path / "base")
    settings = judges.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], modules_to_save=["embed_tokens"])
    judges.get_peft_model(judge, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="was trained separately from the other end"):
        peft.read_lora(tmp_path / "adapter", external.read_external_model(tmp_path / "base"))

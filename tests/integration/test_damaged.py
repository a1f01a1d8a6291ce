"""Files with changed, cut, added and moved bytes: read as what they still are, or refused in one line; never anything else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.quantize import unquantized_shapes
from moe_train.model.transformer import abstract_model, init_model
from moe_train.proof import reread
from moe_train.weights import external, external_adapter, gguf, hf, mistral, names, peft, safetensors_files
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora

MODEL = config.Model(
    family="mixtral",
    vocab_size=8,
    model_dim=32,
    num_layers=1,
    attention=config.GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=32, num_experts=2, experts_per_token=1),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*_proj"), rank=1, alpha=2.0),))
SECONDS = 5.0
"""Of the processor, that a file of some kilobytes may take at most."""


def numbers(piece: names.WeightPiece, dtype: str = "float32") -> np.ndarray:
    return np.full(piece.shape, 0.5, dtype)


def write_model(folder: Path, layout: str) -> None:
    match layout:
        case "hf":
            hf.write(folder, MODEL, "bfloat16", lambda piece: numbers(piece, "bfloat16"))
        case "mistral":
            mistral.write(folder, MODEL, "float32", numbers)
        case _:  # q8_0
            gguf.write(
                folder, MODEL, layout, lambda piece, dtype: np.full(piece.internal_shape, 0.5, dtype).reshape(piece.part_shape)
            )


def read_model(folder: Path) -> None:
    """Everything that a start from it reads, and the second reader of the proof."""
    found = external.open_external_weights(folder)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    names.check_file_tensors(
        folder, found.pieces, shapes, {path: like.shape for path, like in unquantized_shapes(SHAPES[""]).items()}
    )
    for tensor in found.tensors.values():
        assert tensor.read().shape == tensor.shape
    reread.tensors(folder)


def write_adapter(folder: Path, layout: str) -> None:
    with jax.set_mesh(ONE):
        weights = parameters(init_model(0, MODEL, config.Compute(), LORA))[1]
        match layout:
            case "peft":
                peft.export_adapter(weights, MODEL, LORA, folder / "out", base_model="base")
            case "mistral-lora":
                mistral_lora.export_adapter(weights, MODEL, LORA, folder / "out", dtype="float32")
            case _:
                gguf_lora.export_adapter(weights, MODEL, LORA, folder / "out", base_model="base")
    for file in (folder / "out").iterdir():
        file.rename(folder / file.name)
    (folder / "out").rmdir()


def read_adapter(folder: Path) -> None:
    lora = external_adapter.read_external_lora(folder, MODEL)
    if lora.targets != LORA.targets and sum(target.rank for target in lora.targets) > 8:
        return  # a changed adapter of other ranks is an adapter as well
    with jax.set_mesh(ONE):
        shapes = parameters(abstract_model(MODEL, config.Compute(), lora))[1]
        external_adapter.load_external_adapter(folder, MODEL, {path: like for path, like in shapes.items() if ".lora_" in path})


ONE = make_mesh(config.Mesh(), jax.devices()[:1])
with jax.set_mesh(ONE):
    SHAPES = {"": parameters(abstract_model(MODEL, config.Compute()))[1]}
KINDS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], None], str]] = {
    # how it is written, how it is read, what is damaged
    "hf": (write_model, read_model, "*.safetensors"),
    "mistral": (write_model, read_model, "*.safetensors"),
    "q8_0": (write_model, read_model, "*.gguf"),
    "peft": (write_adapter, read_adapter, "*.safetensors"),
    "mistral-lora": (write_adapter, read_adapter, "*.safetensors"),
    "gguf-lora": (write_adapter, read_adapter, "*.gguf"),
}
# Beside the weights: what says their architecture, and which files they are in.
SIDE = {
    **{"hf": ["config.json", safetensors_files.INDEX_FILE], "mistral": ["params.json"]},
    **{"peft": ["adapter_config.json"], "mistral-lora": ["params.json"]},
}
BYTES = st.integers(0, 255) | st.sampled_from(b'0129"{}[]:,-.eE\n\xff\x80\x00 tfn')


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            KINDS[kind][0](made[kind], kind)
            KINDS[kind][1](made[kind])
        return made[kind]

    return find


def damage(data: st.DataObject, content: bytearray) -> bytearray:
    """One to four changes, most of them in the first part, where the header is."""
    for _ in range(data.draw(st.integers(1, 4))):
        size = len(content)
        at = data.draw(st.integers(0, min(size, 1500) - 1) | st.integers(0, size - 1))
        match data.draw(st.sampled_from(["set", "set", "set", "cut", "insert", "delete", "move", "count"])):
            case "set":
                content[at] = data.draw(BYTES)
            case "cut":
                del content[max(at, 1) :]
            case "insert":
                content[at:at] = bytes(data.draw(st.lists(BYTES, min_size=1, max_size=9)))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 40))]
            case "move":
                there = data.draw(st.integers(0, size - 1))
                content[at : at + 24] = content[there : there + 24]
            case _:  # of 8 bytes, as headers have them
                value = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]))
                content[at : at + 8] = value.to_bytes(8, "little")
        if not content:
            return bytearray(b"\0")
    return content


def try_damaged(kind: str, folder: Path, here: Path, data: st.DataObject) -> None:
    _, read, pattern = KINDS[kind]
    (weights,) = folder.glob(pattern)
    for file in here.iterdir():
        file.unlink()
    for file in folder.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    victim = here / data.draw(
        st.sampled_from([weights.name] * 3 + [name for name in SIDE.get(kind, []) if (folder / name).is_file()])
    )
    victim.write_bytes(damage(data, bytearray(victim.read_bytes())))
    start = time.process_time()
    try:
        read(here)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, error
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(kind: str, good: Callable[[str], Path], tmp_path: Path, data: st.DataObject) -> None:
    try_damaged(kind, good(kind), tmp_path, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_at_random(kind: str, good: Callable[[str], Path], tmp_path: Path, data: st.DataObject) -> None:
    try_damaged(kind, good(kind), tmp_path, data)


def test_more_layers_or_experts_than_tensors_are_refused_before_a_table_is_made(tmp_path: Path) -> None:
    write_model(tmp_path, "hf")
    settings = json.loads((tmp_path / "config.json").read_text())
    for key, what in (("num_hidden_layers", "layers"), ("num_local_experts", "experts")):
        (tmp_path / "config.json").write_text(json.dumps({**settings, key: 10**9}))
        with pytest.raises(ValueError, match=rf"states 1,000,000,000 {what}, but has 16 tensors"):
            external.open_external_weights(tmp_path)

"""The tower and projector of a multimodal base travel unchanged into exports, and the proof finds every change."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.checkpoint.model_dir import open_model
from moe_train.commands import write_and_prove
from moe_train.commands.adapters import merge_into
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.multimodal_base import find_mmproj
from moe_train.commands.verify import verify
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.model.paths import ParameterPath
from moe_train.weights import external, hf, safetensors_files
from moe_train.weights.texts import Texts
from moe_train.weights.wrappers import carry, towers, whisper
from tests.commands import runs
from tests.commands.wrapper import LAYER, LORA, TEXT, TOWER, VISION, WHISPER_ARGS, save_run_on_wrapper, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE

TENSORS = ExportOptions(depth="tensors")


def bytes_of(folder: Path, stem: str = "model") -> dict[str, tuple[Any, ...]]:
    """The tensors outside the text model, as (dtype, shape, bytes)."""
    opened = safetensors_files.open_model_tensors(folder, stem, lambda name: True)
    found = {}
    for name, tensor in opened.items():
        if not name.startswith(("language_model.", "layers.", "tok_embeddings.", "norm.", "output.")):
            found[name] = (tensor.dtype.name, tensor.shape, tensor.read().tobytes())
    return found


def failed(checks: list[Any]) -> dict[str, str]:
    return {check.name: check.summary for check in checks if check.passed is False}


@pytest.fixture
def run_dir(small_tokenizer: HuggingFace, tmp_path: Path) -> Path:
    """A folder with `base`, whose tower has a tensor in FP8 and one in bfloat16, and `run`, adapters that started from it."""
    with jax.set_mesh(ONE):
        weights = random_parameters(TEXT, lora=LORA)
        tower = {f"{LAYER}feed_forward.up_proj.weight": np.ones((12, 8), ml_dtypes.float8_e4m3fn)}
        tower |= {f"{LAYER}feed_forward.up_proj.weight_scale_inv": np.full((), 0.5, np.float32)}
        tower |= {"vision_tower.ln_pre.weight": np.linspace(0, 1, 8).astype(ml_dtypes.bfloat16)}
        save_wrapper(tmp_path / "base", weights, tower=tower)
        sections = {"model": TEXT, "mesh": config.Mesh(), "loss": config.Loss(), "lora": LORA}
        runs.save_run(tmp_path / "run", weights, small_tokenizer, init_from=str(tmp_path / "base"), **sections)
    return tmp_path


def test_a_merged_export_is_the_whole_model(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        record = export(run_dir / "run", run_dir / "out", merge=True, options=ExportOptions(max_shard_size="4KB"))
    assert f"vision tower and projector ({len(TOWER) + 1} tensors" in caplog.text and "carried into the export" in caplog.text
    assert {c["name"]: c["passed"] for c in record["checks"]}["carried"]
    assert bytes_of(run_dir / "out") == bytes_of(run_dir / "base")
    before, after = (json.loads((run_dir / name / "config.json").read_text()) for name in ("base", "out"))
    for key in ("architectures", "model_type", "vision_config", "image_token_index", "spatial_merge_size"):
        assert after[key] == before[key]
    same = (run_dir / name / "preprocessor_config.json" for name in ("base", "out"))
    assert len({file.read_bytes() for file in same}) == 1
    assert external.read_external_model(run_dir / "out") == TEXT and hf.is_wrapper(run_dir / "out")
    for given in ({}, {"base": run_dir / "base"}, {"run": run_dir / "run"}):
        assert not failed(verify(run_dir / "out", **given)[1])
    again = export(run_dir / "out", run_dir / "again", options=TENSORS)
    assert "left_out" not in again and bytes_of(run_dir / "again") == bytes_of(run_dir / "base")


def test_a_quantized_tower_is_dequantized_in_mistrals_own_layout(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As vLLM reads it: names without scales, of an unquantized tower."""
    record = export(run_dir / "run", run_dir / "native", "mistral", merge=True, options=TENSORS)
    (check,) = (check for check in record["checks"] if check["name"] == "carried")
    assert check["passed"] and check["figures"]["dequantized"] == 1 and "are FP8 and are written dequantized" in caplog.text
    up = "vision_encoder.transformer.layers.0.feed_forward.w3.weight"
    halves = np.full((12, 8), 0.5, ml_dtypes.bfloat16).tobytes()
    assert bytes_of(run_dir / "native", "consolidated")[up] == ("bfloat16", (12, 8), halves)
    assert "quantization" not in json.loads((run_dir / "native/params.json").read_text())
    assert not failed(verify(run_dir / "native", base=run_dir / "base", depth="tensors")[1])
    file = run_dir / "native/consolidated.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors[up] *= 2  # the codes as a reader without scales would take them
    safetensors.numpy.save_file(tensors, file)
    reasons = failed(verify(run_dir / "native", base=run_dir / "base", depth="tensors")[1])
    assert f"{up} in consolidated.safetensors does not have the dequantized numbers of" in reasons["carried"]


NAME = f"{LAYER}attention.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update({NAME: tensors[NAME] + 1}), f"{NAME} has changed"),
        (lambda tensors: tensors.pop(NAME), f"{NAME} is missing"),
        (
            lambda tensors: tensors.update({"vision_tower.more": np.ones(1)}),
            "vision_tower.more in .* is not a tensor of",
        ),
    ],
    ids=["changed", "missing", "added"],
)
def test_verify_finds_what_is_no_longer_carried(change: Any, message: str, small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    export(tmp_path / "run", tmp_path / "out", merge=True, options=TENSORS)
    (file,) = (tmp_path / "out").glob("model-*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    assert re.search(message, failed(verify(tmp_path / "out", depth="tensors")[1])["tensors"])
    if "vision_tower.more" not in tensors:
        reason = failed(verify(tmp_path / "out", base=tmp_path / "base", depth="tensors")[1])["carried"]
        assert NAME in reason


def test_an_export_whose_tower_is_damaged_never_appears(
    small_tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    monkeypatch.setattr(carry.CarriedTensor, "read", lambda self: np.zeros(self.base.shape, self.base.dtype))
    with pytest.raises(RuntimeError, match=r"the proof failed \(carried\): .* does not have the bytes of "):
        export(tmp_path / "run", tmp_path / "out", merge=True, options=TENSORS)
    assert not (tmp_path / "out").exists()


def test_there_and_back_through_mistrals_own_layout(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    shutil.copyfile(small_tokenizer.files[0], tmp_path / "base" / "tokenizer.json")
    for file in small_tokenizer.files[1:]:
        shutil.copyfile(file, tmp_path / "base" / file.name)
    export(tmp_path / "base", tmp_path / "native", "mistral", options=TENSORS)
    params = json.loads((tmp_path / "native/params.json").read_text())
    section = params["vision_encoder"]
    assert (section["mm_projector_id"], section["spatial_merge_size"], section["max_image_size"]) == ("patch_merge", 2, 8)
    assert section["add_pre_mm_projector_layer_norm"] and not section["adapter_bias"] and section["image_break_token_id"] == -1
    native = bytes_of(tmp_path / "native", "consolidated")
    assert len(native) == len(TOWER) and not [name for name in native if name.startswith(("vision_tower", "multi_modal"))]
    q = np.frombuffer(bytes_of(tmp_path / "base")[f"{LAYER}attention.q_proj.weight"][2], np.float32).reshape(2, 2, 2, 8)
    # Two heads of four rows: pairs half a head apart become adjacent.
    adjacent = np.stack([q[:, 0], q[:, 1]], axis=2).reshape(8, 8)
    assert native["vision_encoder.transformer.layers.0.attention.wq.weight"][2] == adjacent.tobytes()
    record = export(tmp_path / "native", tmp_path / "again", options=TENSORS)
    assert {c["name"]: c["passed"] for c in record["checks"]}["carried"]
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "base")
    fields = json.loads((tmp_path / "again/config.json").read_text())
    assert fields["architectures"] == ["Mistral3ForConditionalGeneration"] and fields["spatial_merge_size"] == 2
    assert fields["vision_config"].items() >= VISION.items()
    assert json.loads((tmp_path / "again/preprocessor_config.json").read_text())["size"] == {"longest_edge": 8}
    export(tmp_path / "native", tmp_path / "same", "mistral", options=TENSORS)
    assert bytes_of(tmp_path / "same", "consolidated") == native
    for folder in ("native", "again", "same"):
        assert not failed(verify(tmp_path / folder, base=tmp_path / "native", depth="tensors")[1])


def test_a_full_fine_tune_needs_its_base_at_export(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        weights = random_parameters(TEXT)
        save_wrapper(tmp_path / "base", weights)
        sections = {"model": TEXT, "mesh": config.Mesh(), "loss": config.Loss()}
        runs.save_run(tmp_path / "first", weights, small_tokenizer, init_from=str(tmp_path / "base"), **sections)
        runs.save_run(tmp_path / "run", weights, small_tokenizer, init_from=str(tmp_path / "first"), **sections)
    options = ExportOptions(depth="tensors", dtype="float32")
    export(tmp_path / "run", tmp_path / "out", options=options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"started from the multimodal model .*base.* does not exist here.*--text-only"):
        export(tmp_path / "run", tmp_path / "other", options=options)
    assert not (tmp_path / "other").exists()
    text = ExportOptions(depth="tensors", dtype="float32", text_only=True)
    export(tmp_path / "run", tmp_path / "text", options=text)
    assert not bytes_of(tmp_path / "text").keys() & TOWER.keys() and not hf.is_wrapper(tmp_path / "text")
    save_wrapper(tmp_path / "base", weights, tower={"multi_modal_projector.norm.weight": np.ones(8, np.float32)})
    with pytest.raises(ValueError, match=r"have changed since .*run was started \(1 tensors, the first multi_modal_projector"):
        export(tmp_path / "run", tmp_path / "other", options=options)


def test_merged_adapters_keep_the_tower(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    for file in small_tokenizer.files:
        shutil.copyfile(file, tmp_path / "base" / file.name)
    merge_into(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "base")
    merge_into(tmp_path / "base", tmp_path / "run", tmp_path / "text", text_only=True)
    assert not hf.is_wrapper(tmp_path / "text")
    for layout in ("peft", "gguf"):
        with pytest.raises(ValueError, match=f"--text-only has no effect with --format {layout}"):
            export(tmp_path / "run", tmp_path / "no", layout, layout == "gguf", ExportOptions(text_only=True))
    with pytest.raises(ValueError, match=r"--text-only has no effect: .* is a text model"):
        export(tmp_path / "text", tmp_path / "no", options=ExportOptions(text_only=True))


def test_where_the_tower_of_a_gguf_file_comes_from(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    record = export(tmp_path / "run", tmp_path / "gguf", "gguf", merge=True, options=TENSORS)
    assert record["mmproj"]["command"].startswith(f"moe-train export {tmp_path}/run HF_EXPORT --merge && python convert_hf_to_gguf")
    (tmp_path / "base/mmproj-F16.gguf").write_bytes(b"GGUF of the tower")
    options = ExportOptions(depth="tensors", server="llama.cpp")
    record = export(tmp_path / "run", tmp_path / "with", "gguf", merge=True, options=options)
    assert record["serve"].endswith(f"-m {tmp_path}/with/model.gguf --mmproj {tmp_path}/with/mmproj-F16.gguf")
    assert (tmp_path / "with/mmproj-F16.gguf").read_bytes() == b"GGUF of the tower"
    assert not failed(verify(tmp_path / "with", depth="tensors")[1])
    assert find_mmproj(tmp_path / "run", trains_embeddings=True).command is not None
    assert external.layout_of(tmp_path / "with") == "gguf"


def test_a_voxtral_goes_into_the_other_layout_and_back(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    base = tmp_path / "base"
    with jax.set_mesh(ONE):
        texts = Texts(small_tokenizer, small_tokenizer.chat_template)
        options = write_and_prove.WriteOptions(dtype="float32", layout="mistral", depth="tensors", texts=texts)
        write_and_prove.export_model(random_parameters(TEXT), TEXT, base, options)
    tensors = safetensors.numpy.load_file(base / "consolidated.safetensors")
    tensors["mm_whisper_embeddings.tok_embeddings.weight"] = tensors.pop("tok_embeddings.weight")
    params = json.loads((base / "params.json").read_text()) | {"multimodal": {"whisper_model_args": WHISPER_ARGS}}
    (base / "params.json").write_text(json.dumps(params))
    draw = np.random.default_rng(4).normal
    settings = towers.native_settings(params, TEXT.model_dim)
    assert settings is not None
    rows = towers.tower_tensors(settings)
    tensors |= {row.native: draw(size=row.shape).astype(np.float16) for row in rows if row.native is not None}
    safetensors.numpy.save_file(tensors, base / "consolidated.safetensors")
    export(base, tmp_path / "same", "mistral", options=TENSORS)
    export(base, tmp_path / "hf", options=TENSORS)
    export(tmp_path / "hf", tmp_path / "again", "mistral", options=TENSORS)
    for name in ("same", "again"):
        assert bytes_of(tmp_path / name, "consolidated") == bytes_of(base, "consolidated")
        assert json.loads((tmp_path / name / "params.json").read_text())["multimodal"] == params["multimodal"]
    assert json.loads((tmp_path / "hf/preprocessor_config.json").read_text())["n_samples"] == 2 * 6 * 160
    for name, origin in (("same", base), ("hf", base), ("again", tmp_path / "hf")):
        assert not failed(verify(tmp_path / name, base=origin, depth="tensors")[1])
    assert "HF_EXPORT" in str(find_mmproj(base, trains_embeddings=False).command)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    stored = safetensors.numpy.load_file(file)
    stored[whisper.POSITIONS][3, 1] += 0.01
    safetensors.numpy.save_file(stored, file, {"format": "pt"})
    reasons = failed(verify(tmp_path / "hf", base=base, depth="tensors")[1])
    assert re.search(r"embed_positions\.weight differs by 0\.0\d+ from the sinusoids", reasons["carried"]) and "tensors" in reasons


def test_a_quantized_export_excludes_the_tower(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    save_run_on_wrapper(tmp_path, small_tokenizer)
    for layout in ("hf", "mistral"):
        options = ExportOptions(depth="tensors", dtype="fp8")
        record = export(tmp_path / "run", tmp_path / layout, layout, merge=True, options=options)
        assert {c["name"]: c["passed"] for c in record["checks"]}["carried"]
        assert not failed(verify(tmp_path / layout, base=tmp_path / "base", depth="tensors")[1])
    section = json.loads((tmp_path / "hf/config.json").read_text())["quantization_config"]
    excluded = {"lm_head", "model.vision_tower", "model.multi_modal_projector"}
    assert section["quant_method"] == "fp8" and set(section["modules_to_not_convert"]) == excluded
    assert bytes_of(tmp_path / "hf") == bytes_of(tmp_path / "base")
    again = export(tmp_path / "hf", tmp_path / "again", options=TENSORS)
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text()) and "carried" in again


ADAPTED = config.Lora(
    targets=(config.LoraTarget(modules=("attention.*", "vision.tower.*_proj"), rank=2, alpha=3.0),), train=("vision.projector.*",)
)
TRAINED: dict[str, tuple[config.Lora | None, tuple[str, ...], tuple[str, ...]]] = {
    # How a run trains, and parts of the names of the tensors of tower and projector that it changes.
    "in full": (None, ("vision.projector.*", "vision.tower.*norm"), ("multi_modal", "norm", "ln_pre")),
    "projector alone": (config.Lora(train=("vision.projector.*",)), (), ("multi_modal",)),
    "adapters": (ADAPTED, (), ("multi_modal", "_proj.weight", "_conv.weight")),
}


def save_run_with_tower(folder: Path, tokenizer: HuggingFace, lora: config.Lora | None, patterns: tuple[str, ...]) -> Path:
    """`folder / "run"`, which trained parts of the tower of `folder / "base"`."""
    with jax.set_mesh(ONE):
        save_wrapper(folder / "base", random_parameters(TEXT))
        encoder = external.read_encoder(folder / "base", config.VisionEncoder)
        weights = random_parameters(TEXT, lora=lora, encoder=encoder, seed=3)
        vision = config.Vision(patches_per_row=16, encoder=encoder, train=patterns)
        sections = {"model": TEXT, "mesh": config.Mesh(), "loss": config.Loss(), "lora": lora, "vision": vision}
        runs.save_run(folder / "run", weights, tokenizer, init_from=str(folder / "base"), **sections)
    return folder / "run"


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_tower_is_exported_and_proved(kind: str, small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    lora, patterns, parts = TRAINED[kind]
    changed = {name for name in TOWER if any(part in name for part in parts)}
    run = save_run_with_tower(tmp_path, small_tokenizer, lora, patterns)
    base = tmp_path / "base"
    merge = lora is ADAPTED
    record = export(run, tmp_path / "hf", merge=merge, options=ExportOptions() if merge else TENSORS)
    before, after = bytes_of(base), bytes_of(tmp_path / "hf")
    assert before.keys() == after.keys() and {name for name in before if before[name] != after[name]} == changed
    checks = {check["name"]: check for check in record["checks"]}
    assert checks["carried"]["figures"]["count"] == len(TOWER) - len(changed)
    if merge:
        assert "those of the trained tower" in checks["features"]["said"]
        again = {check.name: check for check in verify(tmp_path / "hf", base=base)[1]}
        # Attention of two layers and seven maps of the tower's; in full, the projector's four tensors, and the kernel, of no rank.
        assert again["features"].passed and again["merge"].metrics["adapted"] == 2 * 4 + 7
        assert again["merge"].metrics["trained_in_full"] == 5
    export(run, tmp_path / "native", "mistral", merge=merge, options=TENSORS)
    for name in ("hf", "native"):
        assert not failed(verify(tmp_path / name, run=run, depth="tensors")[1])
        assert not failed(verify(tmp_path / name, base=base, depth="tensors")[1])
    # Another layout and back is exact, as without training.
    export(tmp_path / "native", tmp_path / "again", options=TENSORS)
    assert bytes_of(tmp_path / "again") == after
    if kind == "projector alone":  # which stays bfloat16 beside a text model in FP8
        export(run, tmp_path / "fp8", options=ExportOptions(depth="tensors", dtype="fp8"))
        assert bytes_of(tmp_path / "fp8")["multi_modal_projector.linear_1.weight"][0] == "bfloat16"
        assert not failed(verify(tmp_path / "fp8", run=run, depth="tensors")[1])
    # llama.cpp's file of the base's tower would be that of another one.
    (base / "mmproj-F16.gguf").write_bytes(b"GGUF of the tower")
    assert "command" in export(run, tmp_path / "gguf", "gguf", merge=merge, options=TENSORS)["mmproj"]
    assert not failed(verify(tmp_path / "gguf", run=run, depth="tensors")[1])
    opened = open_model(run)
    with jax.set_mesh(opened.mesh):
        opened.load()
        whole = opened.load_with_tower()[1]
        assert len([path for path in whole if ParameterPath.parse(path).is_vision]) >= 15
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    stored = safetensors.numpy.load_file(file)
    stored["multi_modal_projector.linear_1.weight"][1, 0] += 0.01
    safetensors.numpy.save_file(stored, file, {"format": "pt"})
    assert "is not vision.projector.in_proj.weight" in failed(verify(tmp_path / "hf", run=run, depth="tensors")[1])["merge"]


def test_adapters_of_a_tower_are_exported_for_peft_alone(small_tokenizer: HuggingFace, tmp_path: Path) -> None:
    run = save_run_with_tower(tmp_path, small_tokenizer, ADAPTED, ())
    record = export(run, tmp_path / "peft", "peft")
    assert {check["name"]: check["passed"] for check in record["checks"]}["names"]
    assert not failed(verify(tmp_path / "peft", run=run)[1]) and not failed(verify(tmp_path / "peft", base=tmp_path / "base")[1])
    for layout in ("mistral-lora", "gguf-lora"):
        with pytest.raises(ValueError, match=f"--format {layout} cannot hold; use --format peft, or --format hf --merge"):
            export(run, tmp_path / layout, layout)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"vLLM reads no adapters of a tower.*--merge"):
        export(run, tmp_path / "vllm", "peft", options=ExportOptions(server="vllm"))
    for file in (tmp_path / "peft").glob("*token*.json"):
        shutil.copyfile(file, tmp_path / "base" / file.name)
    for adapter in (run, tmp_path / "peft"):
        with pytest.raises(ValueError, match="vision"):
            merge_into(tmp_path / "base", adapter, tmp_path / "merged")


@pytest.mark.parametrize("lora", [LORA, ADAPTED], ids=["text", "tower"])
def test_an_adapter_on_native_files_has_the_names_of_their_export(
    lora: config.Lora, small_tokenizer: HuggingFace, tmp_path: Path
) -> None:
    """transformers loads a base in Mistral's own layout only after an export, which is the whole wrapper."""
    with jax.set_mesh(ONE):
        save_wrapper(tmp_path / "hf", random_parameters(TEXT))
        for file in small_tokenizer.files:
            shutil.copyfile(file, tmp_path / "hf" / file.name)
    export(tmp_path / "hf", tmp_path / "base", "mistral", options=TENSORS)
    with jax.set_mesh(ONE):
        encoder = external.read_encoder(tmp_path / "base", config.VisionEncoder)
        weights = random_parameters(TEXT, lora=lora, encoder=encoder, seed=3)
        sections = {"model": TEXT, "mesh": config.Mesh(), "loss": config.Loss(), "lora": lora}
        sections |= {"vision": config.Vision(patches_per_row=16, encoder=encoder)}
        runs.save_run(tmp_path / "run", weights, small_tokenizer, init_from=str(tmp_path / "base"), **sections)
    record = export(tmp_path / "run", tmp_path / "peft", "peft")
    assert record["in_wrapper"] and {check["name"]: check["passed"] for check in record["checks"]}["names"]
    names = safetensors.numpy.load_file(tmp_path / "peft/adapter_model.safetensors").keys()
    prefixes = {".".join(name.split(".")[3:4]) for name in names}
    assert prefixes == ({"language_model"} if lora is LORA else {"language_model", "vision_tower", "multi_modal_projector"})
    export(tmp_path / "base", tmp_path / "exported", options=TENSORS)
    assert not failed(verify(tmp_path / "peft", base=tmp_path / "exported")[1])

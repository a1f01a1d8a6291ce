"""Compare what an export carries of its multimodal base, its tower and projector, with the files of the base.

The names of both layouts and the order of rows are stated here a second time; nothing comes from `weights.wrappers`. Tensors are
compared by their bytes, whatever their dtype. FP8 tensors keep theirs only from one Hugging Face folder to another; in other
exports they are the base's numbers times their scales, rounded once to the dtype of the base's config, and are no longer FP8.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

from moe_train import config
from moe_train.machine.files import read_object
from moe_train.proof import base_fp8, expected, reread
from moe_train.proof.carried_names import POSITIONS, ROTATED, converted_name
from moe_train.proof.carried_rows import reordered, rows_of
from moe_train.proof.checks import Fault, Finding, ProofRecord, first_and_count
from moe_train.proof.expected_tensor import ExpectedTensor
from moe_train.proof.reread import Stored

_CHUNK_BYTES = 2**20
"""Bytes of a tensor that are hashed at once."""
_OUTSIDE_TEXT = {
    "hf": r"(model\.)?(vision_tower|audio_tower|multi_modal_projector)\.",
    "mistral": r"(vision_|patch_merger\.|pre_mm_projector_norm\.|mm_whisper_embeddings\.(?!tok_embeddings\.))",
}
"""Beginnings of the names of tensors that are carried, by the base's layout."""
_SCALES = ("scale_inv", "weight_scale", "activation_scale", "input_scale", "qscale_weight", "qscale_act")
"""Ends of the names of scales, which dequantized tensors no longer have."""
_OWN_KEYS = {"text_config", "dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "transformers_version"}
"""Keys of config.json that describe the export as a whole or its text model."""


class CarriedFrom(NamedTuple):
    """The multimodal base of an export."""

    base: Path
    layout: Literal["hf", "mistral"]
    """Layout of the base's files."""


class _Expected(NamedTuple):
    """A tensor of the base, and its name in the export."""

    name: str
    stored: Stored
    heads: int
    """Number of heads if the rows of each change places; 0 if the bytes stay."""
    kind: str
    """Dtype in the export."""

    @property
    def is_dequantized(self) -> bool:
        """Whether it is FP8 in the base alone."""
        return self.kind != self.stored.kind


def text_tensors(layout: expected.ModelLayout, model: config.Model, carried: bool, audio: bool = False) -> list[ExpectedTensor]:
    """List the tensors of the text model under their names in an export.

    Args:
        layout: layout of the export.
        model: the text model.
        carried: whether the export is a multimodal model.
        audio: whether its tower is one of audio, in Mistral's own layout.
    """
    tensors = expected.model_tensors(layout, model)
    if carried and layout == "hf":
        return [tensor._replace(name=f"language_model.{tensor.name}") for tensor in tensors]
    if carried and audio:
        # Mistral's own files keep the embeddings of text next to the audio tower.
        embed, *others = tensors
        return [embed._replace(name=f"mm_whisper_embeddings.{embed.name}"), *others]
    return tensors


def is_audio(names: Iterable[str]) -> bool:
    """Return whether carried tensors with these names are those of an audio tower in Mistral's own layout."""
    return any(name.startswith("mm_whisper_embeddings.") for name in names)


def carried_names(origin: CarriedFrom, layout: expected.ModelLayout) -> list[str]:
    """List the names, in an export of this layout, of what it carries of its base."""
    carried = [tensor.name for tensor in _expected(origin, layout)]
    if layout == "hf" and origin.layout == "mistral" and _is_tower_of_audio(_of_layout(origin)):
        carried.append(POSITIONS)
    return carried


def carries_quantized(origin: CarriedFrom | None, layout: expected.ModelLayout) -> bool:
    """Return whether a tensor of the tower or projector is FP8 in an export, which then states a quantization for these alone."""
    if origin is None:
        return False
    return any(tensor.kind.startswith("F8") for tensor in _expected(origin, layout))


def check_carried(
    origin: CarriedFrom, layout: expected.ModelLayout, directory: Path, record: ProofRecord, trained: Collection[str] = ()
) -> Finding:
    """Compare everything that is carried with the base.

    Args:
        origin: the base.
        layout: layout of the export.
        directory: the export.
        record: receives the hashes of the tensors, in the base and in the export.
        trained: names, in the export, of tensors that were trained and so are not the base's.

    Raises:
        Fault: a tensor is missing or differs, or the settings of the tower are not the base's.
    """
    stored = reread.tensors(directory)
    of_base = _of_layout(origin)
    block = base_fp8.stated_block(origin.base)
    faults: list[str] = []
    descriptions: dict[str, dict[str, str]] = {}
    num_bytes = 0
    tensors = [tensor for tensor in _expected(origin, layout) if tensor.name not in trained]
    for tensor in tensors:
        if tensor.name not in stored:
            faults.append(f"{tensor.name} is missing")
            continue
        copy = stored[tensor.name]
        base_sha256 = _sha256(tensor.stored)
        expected_sha256 = base_sha256
        if tensor.heads or tensor.is_dequantized:
            rows = rows_of(tensor.stored, tensor.kind, of_base, block)
            expected_sha256 = hashlib.sha256(reordered(rows, tensor.heads, layout == "mistral").tobytes()).hexdigest()
        sha256 = _sha256(copy)
        if (copy.kind, copy.shape) != (tensor.kind, tensor.stored.shape):
            faults.append(f"{tensor.name} is {copy.kind} {copy.shape}, not {tensor.kind} {tensor.stored.shape}")
        elif sha256 != expected_sha256:
            content = "dequantized numbers" if tensor.is_dequantized else "bytes"
            faults.append(f"{tensor.name} in {copy.file.name} does not have the {content} of {tensor.stored.name} in {origin.base}")
        num_bytes += copy.nbytes
        descriptions[tensor.name] = {"base_name": tensor.stored.name, "base_sha256": base_sha256}
        record["tensors"][tensor.name] = {"file": copy.file.name, "dtype": copy.kind, "shape": copy.shape, "sha256": sha256}
    record["carried"] = {"source": str(origin.base), "layout": origin.layout, "tensors": descriptions}
    positions = _positions(origin, layout, directory)
    if positions is not None:
        faults += _faults_of_positions(positions)
        if layout == "hf":
            sha256 = _sha256(positions)
            record["tensors"][POSITIONS] = {
                "file": positions.file.name,
                "dtype": positions.kind,
                "shape": positions.shape,
                "sha256": sha256,
            }
            descriptions[POSITIONS] = {"computed": "sinusoids of Whisper (arXiv:2212.04356)"}
    faults += _faults_of_settings(origin, layout, directory)
    if faults:
        raise Fault(first_and_count(faults))
    num_dequantized = sum(tensor.is_dequantized for tensor in tensors)
    dequantized = f", {num_dequantized:,} FP8 ones dequantized" if num_dequantized else ""
    return Finding(
        f"{len(descriptions):,} tensors of the tower and projector have the bytes of {origin.base}{dequantized}",
        {"count": len(descriptions), "bytes": num_bytes, "dequantized": num_dequantized},
    )


def _expected(origin: CarriedFrom, layout: expected.ModelLayout) -> list[_Expected]:
    """List every tensor of the base that an export of this layout carries, with its name there.

    The positions of an audio tower, which Mistral's own layout lacks, are left out; see `_check_positions`.
    """
    pattern = re.compile(_OUTSIDE_TEXT[origin.layout])
    of_tower = {name: stored for name, stored in _of_layout(origin).items() if pattern.match(name)}
    audio = _is_tower_of_audio(of_tower)
    heads = 0 if layout == origin.layout or audio else _heads(origin)
    dequantized_kind = None
    if not layout == origin.layout == "hf" and any(stored.kind.startswith("F8") for stored in of_tower.values()):
        dequantized_kind = _kind_of_weights(origin)
        of_tower = {name: stored for name, stored in of_tower.items() if not name.endswith(_SCALES)}
    tensors: list[_Expected] = []
    for name, stored in of_tower.items():
        in_files = name.removeprefix("model.")  # transformers writes no such prefix
        kind = dequantized_kind if dequantized_kind and stored.kind.startswith("F8") else stored.kind
        if layout == origin.layout:
            tensors.append(_Expected(in_files, stored, 0, kind))
            continue
        if in_files == POSITIONS:
            continue
        assert layout != "gguf"  # which has the text model alone
        converted = converted_name(in_files, layout, audio)
        native = converted if layout == "mistral" else in_files
        tensors.append(_Expected(converted, stored, heads if ROTATED.fullmatch(native) else 0, kind))
    return tensors


def _kind_of_weights(origin: CarriedFrom) -> str:
    """Return the dtype to which a base's FP8 weights are dequantized: what a config with a quantization states, or bfloat16."""
    fields = read_object(origin.base / ("config.json" if origin.layout == "hf" else "params.json"))
    levels = (fields.get("text_config") or {}, fields)
    if not any(level.get(key) for level in levels for key in ("quantization", "quantization_config")):
        return "BF16"
    for level in levels:
        for key in ("dtype", "torch_dtype"):
            if level.get(key):
                return {"float32": "F32", "float16": "F16"}.get(level[key], "BF16")
    return "BF16"


def _positions(origin: CarriedFrom, layout: expected.ModelLayout, directory: Path) -> Stored | None:
    """Return the positions of an audio tower where one of two layouts has them; None where none or both have."""
    if layout == origin.layout:
        return None
    of_base = _of_layout(origin)
    if not _is_tower_of_audio(of_base):
        return None
    candidates = of_base if layout == "mistral" else reread.tensors(directory)
    for name in (POSITIONS, f"model.{POSITIONS}"):
        if name in candidates:
            return candidates[name]
    raise Fault(f"{POSITIONS} is missing")


def _faults_of_positions(stored: Stored) -> list[str]:
    """Compare position embeddings with Whisper's sinusoids (arXiv:2212.04356), which readers of Mistral's own layout compute."""
    dtypes = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
    if stored.kind not in dtypes or len(stored.shape) != 2:
        return [f"{stored.name} is {stored.kind} {stored.shape}, which is no table of positions"]
    with stored.file.open("rb") as file:
        table = np.frombuffer(stored.read(file.fileno(), 0, stored.rows), dtypes[stored.kind]).reshape(stored.shape)
    length, channels = stored.shape
    errors: list[float] = []
    for i in range(channels // 2):
        angles = np.arange(length) / 10_000 ** (i / max(1, channels // 2 - 1))
        errors.append(np.abs(table[:, i].astype(np.float64) - np.sin(angles)).max())
        errors.append(np.abs(table[:, channels // 2 + i].astype(np.float64) - np.cos(angles)).max())
    rounding = float(ml_dtypes.finfo(dtypes[stored.kind]).eps)
    if not max(errors, default=0.0) <= 1e-3 + rounding:  # 1e-3: the frequencies in float32
        return [f"{stored.name} differs by {max(errors):.3g} from the sinusoids that readers of Mistral's own layout compute"]
    return []


def _of_layout(origin: CarriedFrom) -> dict[str, Stored]:
    """Read the headers of the base's files in its layout; a folder may have those of both."""
    files: list[Path] = []
    for file in sorted(origin.base.glob("*.safetensors")):
        if file.name.startswith("consolidated") == (origin.layout == "mistral"):
            files.append(file)
    return reread.tensors_of_files(files)


def _is_tower_of_audio(names: Iterable[str]) -> bool:
    """Return whether tensors of a base with these names, in either layout, are those of an audio tower."""
    return any(re.match(r"(model\.)?audio_tower\.|mm_whisper_embeddings\.", name) for name in names)


def _heads(origin: CarriedFrom) -> int:
    """Return the number of heads of the base's vision tower."""
    if origin.layout == "mistral":
        return int(read_object(origin.base / "params.json")["vision_encoder"]["num_attention_heads"])
    section = read_object(origin.base / "config.json").get("vision_config") or {}
    return int(section.get("num_attention_heads") or 16)  # the default of transformers' PixtralVisionConfig


def _sha256(stored: Stored) -> str:
    """Hash the bytes of a tensor, about a MiB at a time."""
    total = hashlib.sha256()
    step = max(1, _CHUNK_BYTES * stored.rows // max(1, stored.nbytes))
    with stored.file.open("rb") as file:
        for start in range(0, stored.rows, step):
            total.update(stored.read(file.fileno(), start, min(start + step, stored.rows)))
    return total.hexdigest()


def _faults_of_settings(origin: CarriedFrom, layout: expected.ModelLayout, directory: Path) -> list[str]:
    """List settings of the tower, and files of the processor, that are not the base's; only where the layout is the same."""
    if layout != origin.layout:
        return []
    name = "config.json" if layout == "hf" else "params.json"
    of_base = read_object(origin.base / name)
    of_export = read_object(directory / name)
    keys = of_base.keys() - _OWN_KEYS if layout == "hf" else of_base.keys() & {"vision_encoder", "multimodal"}
    faults = [f"{key} in {name} is not the base's" for key in sorted(keys) if of_export.get(key) != of_base[key]]
    if layout == "hf":
        for file in sorted(origin.base.glob("*processor_config.json")):
            copy = directory / file.name
            if not copy.is_file() or copy.read_bytes() != file.read_bytes():
                faults.append(f"{file.name} is not the base's")
    return faults

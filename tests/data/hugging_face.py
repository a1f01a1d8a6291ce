"""A Mistral tokenizer's vocabulary and chat format as the files that Hugging Face models ship, and a tekken of a small one."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import mistral_common
import sentencepiece
import tokenizers
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import decoders, models, pre_tokenizers

from moe_train.data.tokenizers.huggingface import HuggingFace

DATA = Path(mistral_common.__file__).parent / "data"
TEKKEN = DATA / "tekken_240911.json"
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
V3 = DATA / FILES["v3"]
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


_THINK = ("[THINK]", "[/THINK]")
_NAMED_LATER = {"v13": _THINK, "v15": (*_THINK, "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")}


def small_tekken(
    directory: Path, version: str, vocab: int = 4000, builder: dict[str, Any] | None = None, image: Any = None, audio: Any = None
) -> Path:
    """The first tokens of a published tekken.json, under a version of choice; v15 with a builder of settings.

    `image` holds the sizes of pictures, and `audio` those of sound; None for a tokenizer without.
    """
    content = json.loads(TEKKEN.read_text(encoding="utf-8"))
    content["config"] |= {"version": version, "num_vocab_tokens": vocab, "default_vocab_size": vocab + 1000}
    content["vocab"] = content["vocab"][:vocab]
    if version not in ("v3", "v7") or audio is not None:  # later ones name their control tokens
        named = list(Tekkenizer.DEPRECATED_SPECIAL_TOKENS)
        # Voxtral's tokens for sound have these ids.
        unnamed = [f"<SPECIAL_{rank}>" for rank in range(len(named), 24)] if audio is not None else []
        of_sound = ("[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]") if audio is not None else ()
        for name in (*unnamed, *of_sound, "[ARGS]", "[CALL_ID]", *_NAMED_LATER.get(version, ())):
            named.append({"rank": len(named), "token_str": name, "is_control": True})
        content["special_tokens"] = named
    if version == "v15":
        effort = {"type": "enum", "values": ["none", "high"], "default": "none", "accepts_none": True}
        schema = {"type": "json_schema", "accepts_none": False, "default": None}
        content["model_settings_builder"] = {"reasoning_effort": effort, "json_schema": schema} if builder is None else builder
    content["image"] = image
    if image is None:
        del content["image"]
    if audio is not None:
        content["audio"] = audio
    path = directory / "tekken.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write(directory: Path, file: Path) -> None:
    """tokenizer.json and beside it what a model ships, from a file that mistral-common reads."""
    converted = _from_tekken(file) if file.suffix == ".json" else _from_sentencepiece(file)
    (directory / "tokenizer.json").write_text(json.dumps(converted), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    template = convert_tokenizer_to_chat_template(file, plain_thinking_support=False if file.suffix == ".json" else None)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _from_sentencepiece(file: Path) -> dict[str, Any]:
    """As transformers converts: two pieces merge to a third in the order of its score."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        parts = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        merges += [(-model.get_score(i), i, vocab[left], vocab[right], (left, right)) for left, right in parts]
    pairs = [pair for *_, pair in sorted(merges)]
    made = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    control = [piece for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    made.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in control])
    return json.loads(made.to_str())


def _from_tekken(file: Path) -> dict[str, Any]:
    """The merges of a token are those that byte-pair encoding does on its bytes with the tokens of lower rank."""
    tekken = Tekkenizer.from_file(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    special = [tekken.id_to_piece(i) for i in range(tekken.num_special_tokens)]
    vocab = {piece: i for i, piece in enumerate(special)}
    ranks = {base64.b64decode(entry["token_bytes"]): i for i, entry in enumerate(content["vocab"])}
    vocab |= {spelled(token): len(special) + rank for token, rank in ranks.items()}
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spelled(parts[0]), spelled(parts[1])))
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(content["config"]["pattern"]), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in special])
    return json.loads(made.to_str())


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def copied(tokenizer: HuggingFace, directory: Path, **changes: object) -> Path:
    """The tokenizer's files with top-level keys of tokenizer.json changed."""
    directory.mkdir()
    for file in tokenizer.files:
        (directory / file.name).write_bytes(file.read_bytes())
    main = json.loads((directory / "tokenizer.json").read_text()) | changes
    (directory / "tokenizer.json").write_text(json.dumps(main))
    return directory

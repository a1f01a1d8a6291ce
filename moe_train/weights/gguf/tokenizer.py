"""Tokenizers inside GGUF files: convert ours to llama.cpp's keys, and these keys to a Hugging Face tokenizer in a folder.

llama.cpp has two kinds that matter here. `gpt2` is byte-level BPE. Its way of splitting text has a name (`tokenizer.ggml.pre`)
that stands for a regular expression in llama.cpp's source; a file cannot bring its own, so an unknown split is refused.
`llama` is sentencepiece's BPE, which merges the neighbors whose union has the highest score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import read_object

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's numbers for the kinds of tokens."""
_PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
"""The key of the chat template."""
SPACE = "▁"
"""What sentencepiece writes for a space."""

# tokenizer.ggml.pre -> (steps of a tokenizer.json before its byte-level one, whether that one splits, ignore_merges)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((), True, False),
    "smollm": (("digits",), True, False),
    "llama-bpe": ((_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,), False, True),
    "qwen2": ((_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,), False, False),
    "tekken": ((_TEKKEN,), False, True),
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "pixtral": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
"""Other names that llama.cpp treats as the same split."""


# --- ours -> keys ------------------------------------------------------------------------------------------------


def tokenizer_settings(tokenizer: Tokenizer, vocab_size: int, chat_template: str | None) -> dict[str, Any]:
    """Return the keys that make llama.cpp tokenize as `tokenizer` does.

    Args:
        tokenizer: the tokenizer.
        vocab_size: the model's; unused tokens pad the vocabulary to it.
        chat_template: Jinja; None without one.

    Raises:
        ValueError: llama.cpp cannot reproduce the tokenizer; the message gives the reason.
    """
    if isinstance(tokenizer, HuggingFace):
        fields = _of_hugging_face(tokenizer)
    else:
        assert isinstance(tokenizer, Mistral)
        (file,) = tokenizer.files
        fields = _of_tekken(file) if file.suffix == ".json" else _of_sentencepiece(file)
        fields["add_bos_token"] = np.bool_(True)
    tokens = fields["tokens"]
    kinds = fields["token_type"]
    padding = range(len(tokens), vocab_size)
    fields["tokens"] = tokens + [f"[PAD{i}]" for i in padding]
    fields["token_type"] = np.array(kinds + [UNUSED for _ in padding], np.int32)
    if "scores" in fields:
        fields["scores"] = np.array(fields["scores"] + [-1e4 for _ in padding], np.float32)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, **fields.pop("ids", {})}
    fields |= {f"{name}_token_id": np.uint32(i) for name, i in ids.items() if i is not None}
    keys = {_PREFIX + key: value for key, value in fields.items()}
    return keys if chat_template is None else {**keys, TEMPLATE: chat_template}


def _of_hugging_face(tokenizer: HuggingFace) -> dict[str, Any]:
    file = tokenizer.files[0]
    described = read_object(file)
    model = described["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"{file} is a {model.get('type')} tokenizer; of these, llama.cpp's architectures here have BPE")
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * len(tokens)
    for text, i in model["vocab"].items():
        tokens[i] = text
        kinds[i] = NORMAL
    for added in described.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if model.get("byte_fallback"):
        fields = _sentencepiece_like(file, described, merges, tokens, kinds)
    else:
        pre = _name_of_split(file, described)
        fields = {"model": "gpt2", "pre": pre, "merges": [f"{left} {right}" for left, right in merges]}
        fields["add_space_prefix"] = np.bool_(False)
    # The encoding of an empty text shows whether the tokenizer itself adds BOS.
    begins = tokenizers.Tokenizer.from_file(str(file)).encode("", add_special_tokens=True).ids == [tokenizer.bos_id]
    names = {"unknown": "unk_token", "padding": "pad_token"}
    ids = {key: tokens.index(tokenizer.named_tokens[name]) for key, name in names.items() if name in tokenizer.named_tokens}
    return {**fields, "tokens": tokens, "token_type": kinds, "add_bos_token": np.bool_(begins), "ids": ids}


def _name_of_split(file: Path, described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how this byte-level tokenizer splits text."""
    normalizer = described.get("normalizer")
    if normalizer and normalizer != {"type": "Sequence", "normalizers": []}:
        raise ValueError(f"{file} normalises text ({normalizer['type']}); llama.cpp's byte-level tokenizer does not")
    first = described.get("pre_tokenizer") or {"type": "none"}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    earlier_steps: list[str] = []
    for step in steps[:-1]:
        match step:
            case {"type": "Digits", "individual_digits": True}:
                earlier_steps.append("digits")
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                earlier_steps.append(regex)
            case _:
                earlier_steps.append(json.dumps(step))
    last = steps[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError(f"{file} is neither a byte-level nor a sentencepiece tokenizer as llama.cpp has them: {json.dumps(last)}")
    ignores = bool(described["model"].get("ignore_merges"))
    own_split = (tuple(earlier_steps), bool(last.get("use_regex", True)), ignores)
    for name, split in _SPLITS.items():
        if split == own_split:
            return name
    nearest = next((name for name, split in _SPLITS.items() if split[:2] == own_split[:2]), None)
    if nearest:
        raise ValueError(f"{file} has ignore_merges {ignores}, llama.cpp's {nearest} the opposite; it would tokenise differently")
    raise ValueError(
        f"{file} splits text in a way that has no name in llama.cpp ({' then '.join(earlier_steps) or 'not at all'}); known here: "
        f"{', '.join(_SPLITS)}"
    )


def _sentencepiece_like(
    file: Path, described: Mapping[str, Any], merges: list[tuple[str, ...]], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """Return scores that merge what the merges merge.

    This requires that all possible merges exist and that those of one token are consecutive; raises ValueError otherwise.
    """
    _name_bytes(tokens, kinds)
    if (unknown := described["model"].get("unk_token")) is not None:
        kinds[tokens.index(unknown)] = UNKNOWN
    place: dict[str, int] = {}
    previous = None
    for rank, (left, right) in enumerate(merges):
        if left + right != previous and left + right in place:
            raise ValueError(f"{file}: the merges of {left + right!r} are not in one place; llama.cpp would tokenise differently")
        previous = left + right
        place.setdefault(previous, rank)
    normal_tokens = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merge_set = set(merges)
    for token in normal_tokens:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in normal_tokens and right in normal_tokens and (left, right) not in merge_set:
                raise ValueError(
                    f"{file} has no merge of {left!r} and {right!r}, which llama.cpp would join; it can not tokenise so"
                )
    scores = [-float(place.get(token, 0)) for token in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": np.bool_(_adds_space(file, described))}


def _name_bytes(tokens: Iterable[str], kinds: list[int]) -> None:
    """Mark the tokens that stand for single bytes."""
    byte = {f"<0x{value:02X}>" for value in range(256)}
    for i, token in enumerate(tokens):
        if token in byte:
            kinds[i] = BYTE


def _adds_space(file: Path, described: Mapping[str, Any]) -> bool:
    """Return whether a space is prepended to text; spaces become ▁ in any case."""
    normalizer = described.get("normalizer")
    pre = described.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if pre is None and normalizer == {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}:
        return True
    if pre is None and normalizer in (replace, {"type": "Sequence", "normalizers": [replace]}):
        return False
    if normalizer is None and pre and pre["type"] == "Metaspace" and pre.get("replacement") == SPACE and pre.get("split") is False:
        return pre.get("prepend_scheme") != "never"
    raise ValueError(f"{file} prepares text in a way that llama.cpp's sentencepiece does not: {json.dumps(normalizer or pre)}")


def _of_sentencepiece(file: Path) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    ids = range(model.vocab_size())
    kind_of = ((model.IsUnknown, UNKNOWN), (model.IsControl, CONTROL), (model.IsUnused, UNUSED), (model.IsByte, BYTE))
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.IdToPiece(i) for i in ids],
        "scores": [model.GetScore(i) for i in ids],
        "token_type": [next((kind for test, kind in kind_of if test(i)), NORMAL) for i in ids],
        "add_space_prefix": np.bool_(True),
        "ids": {"unknown": model.unk_id()},
    }


def _of_tekken(file: Path) -> dict[str, Any]:
    """Convert a tekken file.

    mistral-common merges by the rank of the union, so each way to split a token is a merge, in the order of the ranks.
    """
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = Tekkenizer.from_file(file)
    special = [tekken.id_to_piece(i) for i in range(tekken.num_special_tokens)]
    letters = _byte_letters()
    ordinary = (tekken.id_to_byte_piece(i) for i in range(len(special), tekken.n_words))
    spelled = ["".join(letters[byte] for byte in piece) for piece in ordinary]
    ranks = {piece: rank for rank, piece in enumerate(spelled)}
    merges = []
    for piece in spelled:
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(ranks[left], ranks[right]) for left, right in halves if left in ranks and right in ranks]
        merges += [f"{spelled[left]} {spelled[right]}" for left, right in sorted(pairs)]
    return {
        "model": "gpt2",
        "pre": "tekken",
        "tokens": special + spelled,
        "token_type": [CONTROL] * len(special) + [NORMAL] * len(spelled),
        "merges": merges,
        "add_space_prefix": np.bool_(False),
    }


def _byte_letters() -> list[str]:
    """Return the letter for each byte in a byte-level vocabulary: the byte itself if visible, otherwise one from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


# --- keys -> ours ------------------------------------------------------------------------------------------------


def tokenizer_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a GGUF file's settings that define its tokenizer."""
    return {key: value for key, value in settings.items() if key.startswith(_PREFIX) or key == TEMPLATE}


def tokenizer_hash(found: Mapping[str, Any]) -> str:
    """Return the sha256 of the result of `tokenizer_keys`."""
    total = hashlib.sha256()
    for key, value in sorted(found.items()):
        total.update(f"{key}\0{value.tolist() if isinstance(value, np.ndarray) else value!r}\0".encode())
    return total.hexdigest()


def extract_tokenizer(found: Mapping[str, Any], directory: Path, where: object) -> None:
    """Write the tokenizer of a GGUF file as tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        found: the result of `tokenizer_keys` for the file.
        directory: the folder to write into.
        where: the file, for messages.

    Raises:
        ValueError: the tokenizer is not supported.
    """
    keys = {key.removeprefix(_PREFIX): value for key, value in found.items()}
    kind = keys.get("model")
    tokens = keys.get("tokens")
    remedy = "name a tokenizer in data.tokenizer"
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise ValueError(f"{where} has a tokenizer of kind {kind!r}; read are 'gpt2' and 'llama'; {remedy}")
    kinds = [int(k) for k in keys.get("token_type", [NORMAL] * len(tokens))]
    if len(kinds) != len(tokens):
        raise ValueError(f"{where} has {len(tokens)} tokens, but {len(kinds)} token types; {remedy}")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: int(keys[f"{key}_token_id"]) for name, key in names.items() if f"{key}_token_id" in keys}
    if out_of_range := [f"{name} {i}" for name, i in ids.items() if not 0 <= i < len(tokens)]:
        raise ValueError(f"{where} has {len(tokens)} tokens, but a {out_of_range[0]}; {remedy}")
    if "eos_token" not in ids:
        raise ValueError(f"{where} names no end of sequence ({_PREFIX}eos_token_id); {remedy}")
    if kind == "gpt2":
        described = _byte_level(keys, tokens, kinds, f"{where}: {{}}; {remedy}")
    else:
        described = _sentencepiece(keys, tokens, kinds)
    bos = bool(keys.get("add_bos_token", kind == "llama")) and "bos_token" in ids
    described |= {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": k != USER_DEFINED, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, (token, k) in enumerate(zip(tokens, kinds, strict=True))
            if k in (CONTROL, USER_DEFINED, UNKNOWN)
        ],
        "post_processor": _begin_with(tokens[ids["bos_token"]], ids["bos_token"]) if bos else None,
    }
    config = {name: tokens[i] for name, i in ids.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if isinstance(template := found.get(TEMPLATE), str):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _byte_level(keys: Mapping[str, Any], tokens: list[str], kinds: list[int], refusal: str) -> dict[str, Any]:
    name = keys.get("pre", "default")
    name = _SAME.get(name, name)
    if name not in _SPLITS:
        raise ValueError(refusal.format(f"its text is split as {name!r} has it, which is not read here ({', '.join(_SPLITS)})"))
    earlier_steps, splits, ignores = _SPLITS[name]
    merges = [merge.split(" ") for merge in keys.get("merges", [])]
    if wrong := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(refusal.format(f"{' '.join(wrong[0])!r} is no merge of two tokens"))
    steps = [_step(step) for step in earlier_steps]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits}
    pre_tokenizer = byte_level
    if steps:
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [*steps, byte_level]}
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(_vocab(tokens, kinds), merges, ignore_merges=ignores),
    }


def _step(step: str) -> dict[str, Any]:
    if step == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _sentencepiece(keys: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """Describe a sentencepiece tokenizer for tokenizer.json.

    All ways to split a token become merges, best score first, as when transformers converts sentencepiece models.
    """
    vocab = _vocab(tokens, kinds)
    scores = keys["scores"]
    normal_tokens = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merges = []
    for token in sorted(normal_tokens, key=lambda token: (-scores[vocab[token]], vocab[token])):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in halves if left in normal_tokens and right in normal_tokens]
        merges += [list(pair) for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if keys.get("add_space_prefix", True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepend else []
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown),
    }


def _vocab(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    return {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}


def _bpe(vocab: dict[str, int], merges: list[Any], **settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    defaults |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **defaults, **settings, "vocab": vocab, "merges": merges}


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    first: dict[str, Any] = {"SpecialToken": {"id": token, "type_id": 0}}

    def sequence(name: Literal["A", "B"], type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [first, sequence("A", 0)],
        "pair": [first, sequence("A", 0), {"SpecialToken": {"id": token, "type_id": 1}}, sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }

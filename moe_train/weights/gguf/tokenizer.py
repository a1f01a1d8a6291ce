"""Tokenizers inside GGUF files: convert ours to llama.cpp's keys, and these keys to a Hugging Face tokenizer in a folder.

llama.cpp has two kinds that matter here. `gpt2` is byte-level BPE. Its way of splitting text has a name (`tokenizer.ggml.pre`)
that stands for a regular expression in llama.cpp's source; a file cannot bring its own, so an unknown split is refused.
`llama` is sentencepiece's BPE, which merges the neighbors whose union has the highest score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.gguf.container import GgufSettings

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
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
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


# --- writing ------------------------------------------------------------------------------------------------


def tokenizer_settings(tokenizer: Tokenizer, vocab_size: int, chat_template: str | None) -> GgufSettings:
    """Return the keys that make llama.cpp tokenize as `tokenizer` does.

    Args:
        tokenizer: the tokenizer.
        vocab_size: the model's; unused tokens pad the vocabulary to it.
        chat_template: Jinja; None without one.

    Raises:
        ValueError: llama.cpp cannot reproduce the tokenizer; the message gives the reason.
    """
    if isinstance(tokenizer, HuggingFace):
        fields = _from_hugging_face(tokenizer)
    else:
        assert isinstance(tokenizer, Mistral)
        (file,) = tokenizer.files
        fields = _from_tekken(file) if file.suffix == ".json" else _from_sentencepiece(file)
        fields["add_bos_token"] = np.bool_(True)  # mistral-common always begins a sequence with BOS
    tokens = fields["tokens"]
    kinds = fields["token_type"]
    padding = range(len(tokens), vocab_size)
    fields["tokens"] = tokens + [f"[PAD{i}]" for i in padding]
    fields["token_type"] = np.array(kinds + [UNUSED for _ in padding], np.int32)
    if "scores" in fields:
        fields["scores"] = np.array(fields["scores"] + [-1e4 for _ in padding], np.float32)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, **fields.pop("ids", {})}
    fields |= {f"{name}_token_id": np.uint32(i) for name, i in ids.items() if i is not None}
    keys: GgufSettings = {_PREFIX + key: value for key, value in fields.items()}
    if chat_template is not None:
        keys[TEMPLATE] = chat_template
    return keys


def _from_hugging_face(tokenizer: HuggingFace) -> GgufSettings:
    """Convert a tokenizer.json, byte-level or in the manner of sentencepiece."""
    file = tokenizer.files[0]
    described = read_object(file)
    model = described["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"{file} is a {model.get('type')} tokenizer; llama.cpp has only BPE tokenizers for these architectures")
    merges: list[tuple[str, ...]] = []
    for merge in model["merges"]:
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge  # older files separate the two by a space
        merges.append(tuple(parts))
    # GGUF has a list of tokens without gaps, while the ids of a tokenizer.json may have some.
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * len(tokens)
    for text, i in model["vocab"].items():
        tokens[i] = text
        kinds[i] = NORMAL
    # After the vocabulary, which may contain added tokens too: their kind is that of the added ones.
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
    ids_of_empty_text = tokenizers.Tokenizer.from_file(str(file)).encode("", add_special_tokens=True).ids
    adds_bos = ids_of_empty_text == [tokenizer.bos_id]
    ids: dict[str, int] = {}
    for key, name in (("unknown", "unk_token"), ("padding", "pad_token")):
        if name in tokenizer.named_tokens:
            ids[key] = tokens.index(tokenizer.named_tokens[name])
    return {**fields, "tokens": tokens, "token_type": kinds, "add_bos_token": np.bool_(adds_bos), "ids": ids}


def _name_of_split(file: Path, described: JsonObject) -> str:
    """Return llama.cpp's name for how this byte-level tokenizer splits text."""
    normalizer = described.get("normalizer")
    if normalizer and normalizer != {"type": "Sequence", "normalizers": []}:
        raise ValueError(f"{file} normalizes text ({normalizer['type']}); llama.cpp's byte-level tokenizer does not")
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
        raise ValueError(
            f"{file} is neither a byte-level nor a sentencepiece tokenizer that llama.cpp can reproduce: {json.dumps(last)}"
        )
    # With ignore_merges, a word that is itself a token stays one token, whatever the merges would make of it.
    ignores = bool(described["model"].get("ignore_merges"))
    own_split = (tuple(earlier_steps), bool(last.get("use_regex", True)), ignores)
    for name, split in _SPLITS.items():
        if split == own_split:
            return name
    nearest = next((name for name, split in _SPLITS.items() if split[:2] == own_split[:2]), None)
    if nearest:
        raise ValueError(
            f"{file} has ignore_merges {ignores}, but llama.cpp's {nearest} has the opposite and would tokenize differently"
        )
    raise ValueError(
        f"{file} splits text in a way that has no name in llama.cpp ({' then '.join(earlier_steps) or 'not at all'}); supported: "
        f"{', '.join(_SPLITS)}"
    )


def _sentencepiece_like(
    file: Path, described: JsonObject, merges: list[tuple[str, ...]], tokens: list[str], kinds: list[int]
) -> GgufSettings:
    """Return scores that merge what the merges merge.

    This requires that all possible merges exist and that those of one token are consecutive; raises ValueError otherwise.
    """
    _mark_bytes(tokens, kinds)
    if (unknown := described["model"].get("unk_token")) is not None:
        kinds[tokens.index(unknown)] = UNKNOWN
    first_rank: dict[str, int] = {}
    previous = None
    for rank, pair in enumerate(merges):
        merged = "".join(pair)
        # llama.cpp has one score per union, so no other merge may come between two merges with the same union.
        if merged != previous and merged in first_rank:
            raise ValueError(f"{file}: the merges of {merged!r} are not consecutive; llama.cpp would tokenize differently")
        previous = merged
        first_rank.setdefault(merged, rank)
    normal_tokens = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merge_set = set(merges)
    for token in normal_tokens:
        for pair in _halves(token, normal_tokens):
            # llama.cpp has no list of merges: it joins any two neighbors whose union is a token.
            if pair not in merge_set:
                raise ValueError(
                    f"{file} has no merge of {pair[0]!r} and {pair[1]!r}, but llama.cpp would merge them and tokenize differently"
                )
    # llama.cpp merges the pair whose union has the highest score, so earlier merges get higher scores.
    # A token without merges is no union, so its score is never used.
    scores = [-float(first_rank.get(token, 0)) for token in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": np.bool_(_adds_space(file, described))}


def _halves(token: str, known: Container[str]) -> list[tuple[str, str]]:
    """Return every way to split a token into two known tokens, the shortest first half first."""
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    return [(first, second) for first, second in halves if first in known and second in known]


def _mark_bytes(tokens: Iterable[str], kinds: list[int]) -> None:
    """Set the kind of the tokens that stand for single bytes."""
    byte_tokens = {f"<0x{value:02X}>" for value in range(256)}
    for i, token in enumerate(tokens):
        if token in byte_tokens:
            kinds[i] = BYTE


def _adds_space(file: Path, described: JsonObject) -> bool:
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


def _from_sentencepiece(file: Path) -> GgufSettings:
    """Convert a sentencepiece model, whose scores llama.cpp uses as they are."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    ids = range(model.vocab_size())
    kind_tests = ((model.IsUnknown, UNKNOWN), (model.IsControl, CONTROL), (model.IsUnused, UNUSED), (model.IsByte, BYTE))

    def kind_of(i: int) -> int:
        """Return the kind of a token."""
        for is_kind, kind in kind_tests:
            if is_kind(i):
                return kind
        return NORMAL

    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.IdToPiece(i) for i in ids],
        "scores": [model.GetScore(i) for i in ids],
        "token_type": [kind_of(i) for i in ids],
        "add_space_prefix": np.bool_(True),
        "ids": {"unknown": model.unk_id()},
    }


def _from_tekken(file: Path) -> GgufSettings:
    """Convert a tekken file.

    mistral-common merges by the rank of the union, so each way to split a token is a merge, in the order of the ranks.
    """
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = Tekkenizer.from_file(file)
    # Special tokens have the first ids; the pieces that are merged by rank follow.
    special = [tekken.id_to_piece(i) for i in range(tekken.num_special_tokens)]
    letters = _byte_letters()
    ordinary = (tekken.id_to_byte_piece(i) for i in range(len(special), tekken.n_words))
    spelled = ["".join(letters[byte] for byte in piece) for piece in ordinary]
    ranks = {piece: rank for rank, piece in enumerate(spelled)}
    merges: list[str] = []
    for piece in spelled:
        pairs = sorted(_halves(piece, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [" ".join(pair) for pair in pairs]
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
    # GPT-2's table: spaces and control bytes get printable letters, so that a merge can be stated as two words.
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    letters: list[str] = []
    num_hidden = 0
    for byte in range(256):
        if byte in visible:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + num_hidden))
            num_hidden += 1
    return letters


# --- reading ------------------------------------------------------------------------------------------------


def tokenizer_keys(settings: GgufSettings) -> GgufSettings:
    """Return those of a GGUF file's settings that define its tokenizer."""
    return {key: value for key, value in settings.items() if key.startswith(_PREFIX) or key == TEMPLATE}


def tokenizer_hash(settings: GgufSettings) -> str:
    """Return the sha256 of the result of `tokenizer_keys`."""
    total = hashlib.sha256()
    for key, value in sorted(settings.items()):
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        total.update(f"{key}\0{plain!r}\0".encode())
    return total.hexdigest()


def extract_tokenizer(settings: GgufSettings, directory: Path, source: object) -> None:
    """Write the tokenizer of a GGUF file as tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        settings: the result of `tokenizer_keys` for the file.
        directory: the folder to write into.
        source: the file, for messages.

    Raises:
        ValueError: the tokenizer is not supported.
    """
    keys = {key.removeprefix(_PREFIX): value for key, value in settings.items()}
    kind = keys.get("model")
    tokens = keys.get("tokens")
    remedy = "name a tokenizer in data.tokenizer"
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise ValueError(f"{source} has a tokenizer of kind {kind!r}; supported: 'gpt2' and 'llama'; {remedy}")
    kinds = [int(k) for k in keys.get("token_type", [NORMAL] * len(tokens))]
    if len(kinds) != len(tokens):
        raise ValueError(f"{source} has {len(tokens)} tokens, but {len(kinds)} token types; {remedy}")
    ids: dict[str, int] = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if f"{key}_token_id" in keys:
            ids[name] = int(keys[f"{key}_token_id"])
    if out_of_range := [f"{name} {i}" for name, i in ids.items() if not 0 <= i < len(tokens)]:
        raise ValueError(f"{source} has {len(tokens)} tokens, but a {out_of_range[0]}; {remedy}")
    if "eos_token" not in ids:
        raise ValueError(f"{source} states no end-of-sequence token ({_PREFIX}eos_token_id); {remedy}")
    if kind == "gpt2":
        described = _byte_level(keys, tokens, kinds, f"{source}: {{}}; {remedy}")
    else:
        described = _sentencepiece(keys, tokens, kinds)
    adds_bos = bool(keys.get("add_bos_token", kind == "llama")) and "bos_token" in ids
    described |= {"version": "1.0", "added_tokens": _added_tokens(tokens, kinds), "post_processor": None}
    if adds_bos:
        described["post_processor"] = _begin_with(tokens[ids["bos_token"]], ids["bos_token"])
    config: JsonObject = {name: tokens[i] for name, i in ids.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if isinstance(template := settings.get(TEMPLATE), str):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _added_tokens(tokens: list[str], kinds: list[int]) -> list[JsonObject]:
    """Return the entries `added_tokens` of a tokenizer.json: tokens that are recognized in text before it is split."""
    added: list[JsonObject] = []
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            no_stripping = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            added.append({"id": i, "content": token, "special": kind != USER_DEFINED, "normalized": False, **no_stripping})
    return added


def _byte_level(keys: GgufSettings, tokens: list[str], kinds: list[int], message: str) -> JsonObject:
    """Describe a byte-level tokenizer for tokenizer.json; `message` is the error's text, with {} for the reason."""
    name = keys.get("pre", "default")
    name = _SAME.get(name, name)
    if name not in _SPLITS:
        raise ValueError(message.format(f"its way of splitting text is {name!r}, which is not supported ({', '.join(_SPLITS)})"))
    earlier_steps, splits, ignores = _SPLITS[name]
    merges = [merge.split(" ") for merge in keys.get("merges", [])]
    if wrong := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(message.format(f"{' '.join(wrong[0])!r} is not a merge of two tokens"))
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


def _step(step: str) -> JsonObject:
    """Return a pre-tokenizer for a step of `_SPLITS`: a regular expression, or `digits`."""
    if step == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _sentencepiece(keys: GgufSettings, tokens: list[str], kinds: list[int]) -> JsonObject:
    """Describe a sentencepiece tokenizer for tokenizer.json.

    All ways to split a token become merges, best score first, as when transformers converts sentencepiece models.
    """
    vocab = _vocab(tokens, kinds)
    scores = keys["scores"]
    normal_tokens = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merges: list[list[str]] = []
    for token in sorted(normal_tokens, key=lambda token: (-scores[vocab[token]], vocab[token])):
        pairs = sorted(_halves(token, normal_tokens), key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [list(pair) for pair in pairs]
    normalizers: list[JsonObject] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders: list[JsonObject] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if keys.get("add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})  # removes the prepended space
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown),
    }


def _vocab(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """Return the id of each token, without the unused ones that pad the vocabulary."""
    return {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}


def _bpe(vocab: dict[str, int], merges: list[list[str]], **options: bool | str | None) -> JsonObject:
    """Return the section `model` of a tokenizer.json, with `options` in place of the defaults."""
    defaults: JsonObject = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    defaults |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **defaults, **options, "vocab": vocab, "merges": merges}


def _begin_with(token: str, token_id: int) -> JsonObject:
    """Return the post-processor that puts a token at the beginning of each sequence."""
    first: JsonObject = {"SpecialToken": {"id": token, "type_id": 0}}

    def sequence(name: Literal["A", "B"], type_id: int) -> JsonObject:
        """Return the entry that stands for a sequence's own tokens."""
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [first, sequence("A", 0)],
        "pair": [first, sequence("A", 0), {"SpecialToken": {"id": token, "type_id": 1}}, sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }

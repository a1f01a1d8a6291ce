"""Tokenizers from files: Hugging Face's `tokenizer.json` (library `tokenizers`) and Mistral's own (mistral-common).

Plain text never becomes control tokens: "</s>" inside a document is five characters, not the end of a sequence.
Only a chat template (see `chat`) writes control tokens.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tokenizers

from moe_train import config
from moe_train.json_file import read_object

log = logging.getLogger(__name__)

_MARK = "\ufdd0"  # a Unicode noncharacter, which no text contains

Span = tuple[int, int]
"""Start and end of a part."""


class Marked(NamedTuple):
    """A text for `HuggingFace.encode_marked`, in which control tokens stand between marks, and spans of its characters.

    control: ids of its control tokens, in order. edges: the spans once more, where all begin and end at edges of control tokens
    (None otherwise). Edges are counted from the text's start, which is one, through those of each token, to its end.
    """

    text: str
    spans: list[Span]
    control: list[int]
    edges: list[Span] | None


# What travels with an export, where it exists. The order is that of the identity.
_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer(Protocol):
    """Text to ids and back.

    files: what an export has to carry. identity: sha256 over those files. vocab_size: the largest id plus one.
    """

    files: tuple[Path, ...]
    identity: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    chat_template: str | None

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens, which no plain text has."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any control token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str: ...


def load_tokenizer(section: config.Tokenizer) -> HuggingFace | Mistral:
    """The tokenizer that a config section names. Reads local files alone, never the network.

    Raises FileNotFoundError where the files are missing, ValueError where they cannot be used.
    """
    match section:
        case config.HuggingFaceTokenizer():
            return HuggingFace(section.path)
        case config.MistralTokenizer():
            return Mistral(section.path)


def tokenizer_at(path: str | Path) -> config.Tokenizer:
    """What kind of tokenizer lies at `path`, a folder or a file. Raises FileNotFoundError where there is none."""
    path = Path(path)
    if (path / "tokenizer.json").is_file() or path.name == "tokenizer.json":
        return config.HuggingFaceTokenizer(name="huggingface", path=str(path))
    if (path / "tekken.json").is_file():
        return config.MistralTokenizer(name="mistral", path=str(path / "tekken.json"))
    if path.is_file() or any((*path.glob("tekken*.json"), *path.glob("*.model*"))):
        return config.MistralTokenizer(name="mistral", path=str(path))
    raise FileNotFoundError(f"no tokenizer at {path}; give a folder with tokenizer.json, a tekken.json or a tokenizer.model.v*")


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError where the tokenizer has ids that the model's embedding (vocab_size rows) has not."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.files[0]} has {tokenizer.vocab_size} ids, the model's vocab_size is {vocab_size}; "
            f"use the model's own tokenizer or a model.vocab_size of at least {tokenizer.vocab_size}"
        )


class HuggingFace(Tokenizer):
    """A `tokenizer.json` with the files beside it, read by the `tokenizers` library."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        directory = path.parent if path.is_file() else path
        main = path if path.is_file() else path / "tokenizer.json"
        if not main.is_file():
            raise FileNotFoundError(f"no tokenizer at {main}; give a directory with tokenizer.json, or that file")
        self.path = path
        beside = (directory / name for name in _HUGGING_FACE_FILES[1:])
        self.files = (main, *(file for file in beside if file.is_file()))
        self.identity = _identity(self.files)
        try:
            self._plain = tokenizers.Tokenizer.from_file(str(main))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{main} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}") from error
        # A file may carry the padding and truncation of whoever saved it.
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

        settings = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
        named = {key: _token_text(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        self.named_tokens = {key: text for key, text in named.items() if text is not None}
        if "eos_token" not in self.named_tokens:
            raise ValueError(f"{directory / 'tokenizer_config.json'} names no eos_token; a model could not learn to stop")
        self.bos_id = self._id("bos_token") if "bos_token" in self.named_tokens else None
        self.eos_id = self._id("eos_token")
        self.special_tokens = tuple(token.content for token in self._plain.get_added_tokens_decoder().values() if token.special)
        self.chat_template = _chat_template(directory, settings)

    def _id(self, name: str) -> int:
        found = self._plain.token_to_id(self.named_tokens[name])
        if found is None:
            raise ValueError(f"the {name} {self.named_tokens[name]!r} of tokenizer_config.json is not in {self.files[0]}")
        return found

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self._ids_of_control.values())

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches what looks like a control token."""
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @functools.cached_property
    def _ids_of_control(self) -> dict[str, int]:
        return {token.content: number for number, token in self._plain.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def _control_apart(self) -> bool:
        """Whether control tokens take nothing of the text around them, and stand anywhere."""
        added = self._plain.get_added_tokens_decoder().values()
        return not any(token.lstrip or token.rstrip or token.single_word for token in added if token.special)

    @functools.cached_property
    def _control(self) -> tokenizers.Tokenizer:
        """The same tokenizer with control tokens that nobody can type: each stands between marks. Then text that looks
        like one is tokenised together with what is around it, as it should be. No post-processor: it would trim offsets."""
        content = json.loads(self._plain.to_str())
        names = {token["content"] for token in content["added_tokens"] if token["special"]}
        for token in content["added_tokens"]:
            if token["special"]:
                token |= {"content": _MARK + token["content"] + _MARK, "normalized": False}
        vocab = content["model"]["vocab"]
        marked = {name: _MARK + name + _MARK for name in names}
        if isinstance(vocab, dict):
            content["model"]["vocab"] = {marked.get(piece, piece): number for piece, number in vocab.items()}
        else:  # Unigram's pieces with their scores
            content["model"]["vocab"] = [[marked.get(piece, piece), score] for piece, score in vocab]
        if content["model"].get("unk_token") in marked:
            content["model"]["unk_token"] = marked[content["model"]["unk_token"]]
        return tokenizers.Tokenizer.from_str(json.dumps(content | {"post_processor": None}))

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def marked(self, pieces: Sequence[str], spans: Sequence[Span]) -> Marked:
        """A text that comes in pieces, and spans of its characters: in the first piece, the third and so on control tokens are
        what they are; in the others, what looks like one is text."""
        text = "".join(self.special_pattern.sub(_between_marks, piece) if i % 2 == 0 else piece for i, piece in enumerate(pieces))
        moved = _among_marks(text, spans)
        control = [self._ids_of_control[name] for name in text.split(_MARK)[1::2]]
        edges = [(_edge(text, start), _edge(text, stop)) for start, stop in moved] if self._control_apart else [(-1, -1)]
        return Marked(text, moved, control, None if any(-1 in pair for pair in edges) else edges)

    def encode_marked(self, texts: Sequence[Marked]) -> list[tuple[list[int], list[Span]]]:
        """Ids of each text, and for each of its spans the ids that touch it (first, last + 1)."""
        written = [text.text for text in texts]
        edges = [text.edges for text in texts if text.edges is not None]
        if len(edges) < len(texts):
            encodings = self._control.encode_batch(written, add_special_tokens=False)
            return [(e.ids, [_touching(e, span) for span in text.spans]) for e, text in zip(encodings, texts, strict=True)]
        found = []  # the library is a fifth quicker when it need not say which characters an id is of
        encodings = self._control.encode_batch_fast(written, add_special_tokens=False)
        for encoding, text, borders in zip(encodings, texts, edges, strict=True):
            ids = encoding.ids
            at, places = -1, [0]
            for control in text.control:  # other text has no id of one
                at = ids.index(control, at + 1)
                places += at, at + 1
            places.append(len(ids))
            found.append((ids, [(places[start], places[stop]) for start, stop in borders]))
        return found

    def encode_control(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are what they are."""
        return self.encode_marked([self.marked([text], [])])[0][0]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        return self._plain.decode(list(ids), skip_special_tokens=not keep_special)

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFace, (self.path,)


class Mistral(Tokenizer):
    """A `tekken.json` or `tokenizer.model.v*`; text, chat format and validation are mistral-common's."""

    chat_template = None

    def __init__(self, path: str | Path) -> None:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece
        from mistral_common.tokens.tokenizers.tekken import is_tekken

        self.path = Path(path)
        file = self.path
        if file.is_dir():
            found = sorted(entry for entry in file.iterdir() if is_tekken(entry) or is_sentencepiece(entry))
            if len(found) != 1:
                names = ", ".join(entry.name for entry in found) or "none"
                raise FileNotFoundError(f"{file} should hold one tekken.json or tokenizer.model.v*; found: {names}")
            file = found[0]
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}; give a tekken.json or a tokenizer.model.v*")
        self.files = (file,)
        self.identity = _identity(self.files)
        try:
            self.finetuning = MistralTokenizer.from_file(file, mode=ValidationMode.finetuning)
        except ImportError as error:
            raise ValueError(f"{file} is a sentencepiece model; install sentencepiece, or use tekken.json") from error
        except (MistralCommonException, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a tokenizer that mistral-common reads: {error}") from error
        self._text = self.finetuning.instruct_tokenizer.tokenizer
        self.vocab_size, self.bos_id, self.eos_id = self._text.n_words, self._text.bos_id, self._text.eos_id

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(number for number in range(self.vocab_size) if self._text.is_special(number))

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text, bos=False, eos=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        policy = SpecialTokenPolicy.KEEP if keep_special else SpecialTokenPolicy.IGNORE
        return self._text.decode(list(ids), special_token_policy=policy)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mistral, (self.path,)


def _between_marks(found: re.Match[str]) -> str:
    return _MARK + found[0] + _MARK


def _among_marks(marked: str, spans: Sequence[Span]) -> list[Span]:
    """Places in a text to places in the same with two marks around each control token, the marks part of the token."""
    marks = [found.start() for found in re.finditer(_MARK, marked)]
    before = [at - i for i, at in enumerate(marks)]  # in the text, of each mark
    opening, closing = before[::2], before[1::2]

    def among(at: int) -> int:  # a token that begins here comes with its mark, and one that ends here too
        return at + bisect.bisect_left(opening, at) + bisect.bisect_right(closing, at)

    return [(among(start), among(stop)) for start, stop in spans]


def _edge(marked: str, at: int) -> int:
    """Which edge of a control token a place is at, as `Marked` counts them; -1: none."""
    before = marked.count(_MARK, 0, at)  # two for each token
    if at == 0 or marked[at - 1] == _MARK:
        return before
    return before + 1 if at == len(marked) or marked[at] == _MARK else -1


def _touching(encoding: tokenizers.Encoding, span: Span) -> Span:
    """The tokens (first, last + 1) that have characters of the span; one without characters counts as one long."""
    start, stop = span
    first = next((token for at in range(start, stop) if (token := encoding.char_to_token(at)) is not None), None)
    if first is None:
        return 0, 0
    last = next(token for at in range(stop - 1, -1, -1) if (token := encoding.char_to_token(at)) is not None)
    while first and (chars := encoding.token_to_chars(first - 1)) and chars[0] >= start:
        first -= 1
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) and chars[0] < stop:
        last += 1
    return first, last + 1


def _identity(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """`chat_template.jinja` first, as transformers has it; else the entry of tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template

"""Tokenizers from files: Hugging Face's `tokenizer.json` (library `tokenizers`) and Mistral's own (mistral-common).

Plain text never becomes control tokens: "</s>" inside a document is five characters, not the end of a sequence.
Only a chat template (see `chat`) writes control tokens.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from moe_train.data.tokenizers.tokenizer import Span, Tokenizer, _identity
from moe_train.machine.files import read_object

log = logging.getLogger(__name__)

_MARK = "\ufdd0"  # a Unicode noncharacter, which no text contains


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
        """Join the pieces of a text and mark its control tokens, those in the first piece, the third and so on; what looks like
        a control token in the other pieces is plain text. `spans` are of characters of the joined pieces."""
        text = "".join(self.special_pattern.sub(_between_marks, piece) if i % 2 == 0 else piece for i, piece in enumerate(pieces))
        parts = text.split(_MARK)  # plain text and control tokens in turn
        borders = [0, *itertools.accumulate(map(len, parts))]
        openings, closings = borders[1:-1:2], borders[2:-1:2]

        def among_marks(at: int) -> int:  # a token that begins here comes with its mark, and one that ends here too
            return at + bisect.bisect_left(openings, at) + bisect.bisect_right(closings, at)

        moved = [(among_marks(start), among_marks(stop)) for start, stop in spans]
        control = [self._ids_of_control[name] for name in parts[1::2]]
        number_of = {border: number for number, border in enumerate(borders)}
        edges = [(number_of.get(start, -1), number_of.get(stop, -1)) for start, stop in spans]
        at_edges = self._control_apart and not any(-1 in pair for pair in edges)
        return Marked(text, moved, control, edges if at_edges else None)

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


def _between_marks(found: re.Match[str]) -> str:
    return _MARK + found[0] + _MARK


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

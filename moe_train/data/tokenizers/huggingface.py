"""Hugging Face's `tokenizer.json`, read by the `tokenizers` library.

A text can be encoded with control tokens in it: they are enclosed in marks (`Marked`), so that the same characters typed by a
user remain plain text.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from moe_train.data.pictures.rules import PictureRules
from moe_train.data.tokenizers.offsets import touching
from moe_train.data.tokenizers.processor_files import PROCESSOR_FILES, read_processor_rules
from moe_train.data.tokenizers.stretches import LONGEST_STRETCH, Stretches, stretches_of_json
from moe_train.data.tokenizers.template_files import additional_templates, template_beside
from moe_train.data.tokenizers.tokenizer import Span, Tokenizer, hash_files
from moe_train.machine.files import JsonObject, read_object

_MARK = "\ufdd0"  # a Unicode noncharacter, which no text contains
_OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files next to tokenizer.json that an export includes if they exist, in the order in which the identity hashes them."""


class Marked(NamedTuple):
    """A text for `HuggingFace.encode_marked`, with control tokens enclosed in marks."""

    text: str
    spans: list[Span]
    """Spans of characters of `text`, marks included."""
    control: list[int]
    """Ids of the control tokens in the text, in order."""
    edges: list[Span] | None
    """The spans by the numbers of their borders, if all of them begin and end at borders; None otherwise. Border 0 is the start of
    the text; then come the start and the end of each control token, and last the end of the text.
    """


class HuggingFace(Tokenizer):
    """A `tokenizer.json` with the files next to it, read by the `tokenizers` library."""

    def __init__(self, path: str | Path, longest_stretch: int = LONGEST_STRETCH) -> None:
        """Read the tokenizer.

        Args:
            path: The `tokenizer.json`, or the folder that contains it.
            longest_stretch: Number of characters that are encoded at once (see `stretches`).

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the library cannot read it, it names no eos_token, or a named token is missing from it.
        """
        path = Path(path)
        directory = path.parent if path.is_file() else path
        main = path if path.is_file() else path / "tokenizer.json"
        if not main.is_file():
            raise FileNotFoundError(f"no tokenizer at {main}; give a directory with tokenizer.json, or that file")
        self.path = path
        other_files = [directory / name for name in _OTHER_FILES]
        self.files = (main, *(file for file in other_files if file.is_file()), *additional_templates(directory))
        try:
            self._plain = tokenizers.Tokenizer.from_file(str(main))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{main} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}") from error
        # A file may contain the padding and truncation settings of the program that saved it.
        self._plain.no_padding()
        self._plain.no_truncation()
        self.longest_stretch = longest_stretch
        self._processor = read_processor_rules(directory, self._plain.token_to_id)
        if self._processor.rules is not None:
            # Copied with the tokenizer, and part of its identity, since other sizes make other tokens.
            self.files = (*self.files, *(directory / name for name in PROCESSOR_FILES if (directory / name).is_file()))
        self.identity = hash_files(self.files)
        # Despite its name: special tokens in a text are then encoded as plain characters, and not recognized.
        self._plain.encode_special_tokens = True
        # Not the number of tokens: ids may have gaps, and the embedding needs a row for the largest.
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

        # special_tokens_map.json counts only for what tokenizer_config.json leaves out.
        settings = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
        token_texts = {key: _token_text(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        self.named_tokens = {key: text for key, text in token_texts.items() if text is not None}
        if "eos_token" not in self.named_tokens:
            raise ValueError(f"{directory / 'tokenizer_config.json'} names no eos_token; a model could not learn to stop")
        self.bos_id = self._id("bos_token") if "bos_token" in self.named_tokens else None
        self.eos_id = self._id("eos_token")
        self.adds_bos = self._adds_bos(settings)
        """Whether transformers puts the token that begins a document before a text of its own accord."""
        self.special_tokens = tuple(token.content for token in self._plain.get_added_tokens_decoder().values() if token.special)
        self.chat_template = template_beside(directory, settings)
        self.end_tokens = self._end_tokens(directory, settings)
        ids = (self._plain.token_to_id(token) for token in self.end_tokens)
        self.end_ids = tuple(number for number in ids if number is not None)

    def _id(self, name: str) -> int:
        """Return the id of a named token such as `eos_token`."""
        number = self._plain.token_to_id(self.named_tokens[name])
        if number is None:
            raise ValueError(f"the {name} {self.named_tokens[name]!r} of tokenizer_config.json is not in {self.files[0]}")
        return number

    def _adds_bos(self, settings: JsonObject) -> bool:
        """Return what tokenizer_config.json states, or else whether the post-processor adds the token."""
        stated = settings.get("add_bos_token")
        if isinstance(stated, bool):
            return stated and self.bos_id is not None
        return self.bos_id is not None and self._plain.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    def is_token(self, text: str) -> bool:
        """Return whether a template that writes this text writes one token, and not letters."""
        return text in self._added or len(self.encode(text)) == 1

    @functools.cached_property
    def _added(self) -> frozenset[str]:
        """The texts that are recognized as tokens wherever a template writes them."""
        return frozenset(token.content for token in self._plain.get_added_tokens_decoder().values())

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is exactly this text; None if there is no such token."""
        return self._plain.token_to_id(text)

    def _end_tokens(self, directory: Path, settings: JsonObject) -> tuple[str, ...]:
        """Return the tokens that end a generation: eos_token, eot_token, and those of `generation_config.json`."""
        texts = [self.named_tokens["eos_token"], _token_text(settings.get("eot_token"))]
        ids = _read_json(directory / "generation_config.json").get("eos_token_id")
        for number in ids if isinstance(ids, list) else [ids]:
            texts.append(self._plain.id_to_token(number) if isinstance(number, int) else None)
        return tuple(dict.fromkeys(text for text in texts if text is not None and self.token_id(text) is not None))

    @functools.cached_property
    def _stretches(self) -> Stretches:
        """Where the tokenizer's texts may be split."""
        return stretches_of_json(self.longest_stretch, json.loads(self._plain.to_str()))

    @property
    def media(self) -> PictureRules | None:
        """How pictures become tokens, by the files of the processor beside the tokenizer; None if these do not say."""
        return self._processor.rules

    @property
    def media_fault(self) -> str:
        """Why `media` is None, for a message; empty otherwise."""
        return self._processor.fault

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without any control token. Raises Problem if a stretch of it is too long."""
        if len(text) <= self.longest_stretch:
            return self._plain.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for part in self._stretches.parts(text):
            ids += self._plain.encode(part, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. Raises Problem if a stretch of one is too long."""
        if any(len(text) > self.longest_stretch for text in texts):
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of ids; control tokens are omitted, or written by name with `keep_special`."""
        return self._plain.decode(list(ids), skip_special_tokens=not keep_special)

    def to_json(self) -> str:
        """Return the tokenizer as the text of a `tokenizer.json`, without padding and truncation."""
        return self._plain.to_str()

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens, which plain text never contains."""
        return frozenset(self._ids_of_control.values())

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """A pattern that matches text that looks like a control token."""
        # An alternation takes the first match, so a token that begins another one must come after it.
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        # "(?!)" never matches; an empty pattern would match everywhere.
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def marked(self, pieces: Sequence[str], spans: Sequence[Span]) -> Marked:
        """Join the pieces of a text and enclose its control tokens in marks.

        Args:
            pieces: Pieces of the text. Control tokens are recognized in the first piece, the third and so on; in the others, what
                looks like a control token is plain text.
            spans: Spans of characters of the joined pieces.
        """
        enclosed = list(pieces)
        enclosed[::2] = [self.special_pattern.sub(_between_marks, piece) for piece in pieces[::2]]
        text = "".join(enclosed)
        parts = text.split(_MARK)  # plain text and control tokens alternate
        borders = [0, *itertools.accumulate(map(len, parts))]
        # Lengths are those without marks, since `split` removes them, so borders count characters of the joined pieces.
        openings = borders[1:-1:2]
        closings = borders[2:-1:2]

        def among_marks(position: int) -> int:
            """Translate a position in the joined pieces to one in the marked text; a token includes its marks."""
            return position + bisect.bisect_left(openings, position) + bisect.bisect_right(closings, position)

        marked_spans = [(among_marks(start), among_marks(stop)) for start, stop in spans]
        control = [self._ids_of_control[name] for name in parts[1::2]]
        border_numbers = {border: number for number, border in enumerate(borders)}
        edges = [(border_numbers.get(start, -1), border_numbers.get(stop, -1)) for start, stop in spans]
        # A token that strips or absorbs spaces next to it would move the border away from the mark.
        all_at_borders = self.control_apart and not any(-1 in pair for pair in edges)
        return Marked(text, marked_spans, control, edges if all_at_borders else None)

    def encode_marked(self, texts: Sequence[Marked]) -> list[tuple[list[int], list[Span]]]:
        """Encode texts with control tokens.

        Returns:
            For each text, its ids, and for each of its spans the ids that touch it (first, last + 1).

        Raises:
            Problem: If a stretch of a text is too long.
        """
        if any(len(text.text) > self.longest_stretch for text in texts):
            return [self._encode_marked_parts(text) for text in texts]
        marked = [text.text for text in texts]
        # Where all spans begin and end at control tokens, ids locate them, and the library need not compute character offsets.
        if any(text.edges is None for text in texts):
            encodings = self._control.encode_batch(marked, add_special_tokens=False)
            return [
                (encoding.ids, [touching(encoding, span) for span in text.spans])
                for encoding, text in zip(encodings, texts, strict=True)
            ]
        encodings = self._control.encode_batch_fast(marked, add_special_tokens=False)  # a fifth faster, as it computes no offsets
        return [(encoding.ids, _from_edges(encoding.ids, text)) for encoding, text in zip(encodings, texts, strict=True)]

    def _encode_marked_parts(self, text: Marked) -> tuple[list[int], list[Span]]:
        """Encode one text in parts, so that memory is bounded."""
        stretches = self._stretches
        # Offsets are those of the whole text only if nothing is dropped between its parts.
        if text.edges is None and stretches.dropped:
            stretches = Stretches(self.longest_stretch)
        ids: list[int] = []
        touched: list[Span] = [(0, 0)] * len(text.spans)
        begin = 0
        for part in stretches.parts(text.text):
            encoding = self._control.encode(part, add_special_tokens=False)
            for i, (start, stop) in enumerate(text.spans if text.edges is None else ()):
                first, last = touching(encoding, (max(start - begin, 0), min(stop - begin, len(part))))
                if last:
                    touched[i] = (touched[i][0] if touched[i][1] else len(ids) + first, len(ids) + last)
            ids += encoding.ids
            begin += len(part)
        return ids, touched if text.edges is None else _from_edges(ids, text)

    def encode_control(self, text: str) -> list[int]:
        """Return the ids of a text in which control tokens are recognized."""
        return self.encode_marked([self.marked([text], [])])[0][0]

    @functools.cached_property
    def _ids_of_control(self) -> dict[str, int]:
        """Control token -> id."""
        return {token.content: number for number, token in self._plain.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def control_apart(self) -> bool:
        """Whether control tokens never absorb text around them and are recognized anywhere."""
        added = self._plain.get_added_tokens_decoder().values()
        return not any(token.lstrip or token.rstrip or token.single_word for token in added if token.special)

    @functools.cached_property
    def _control(self) -> tokenizers.Tokenizer:
        """The same tokenizer, except that its control tokens are enclosed in marks, so that nobody can type them.

        Text that looks like a control token is then tokenized together with the text around it. The post-processor is removed: it
        would trim offsets.
        """
        content = json.loads(self._plain.to_str())
        names = {token["content"] for token in content["added_tokens"] if token["special"]}
        for token in content["added_tokens"]:
            if token["special"]:
                token |= {"content": _MARK + token["content"] + _MARK, "normalized": False}
        vocab = content["model"]["vocab"]
        marked = {name: _MARK + name + _MARK for name in names}
        if isinstance(vocab, dict):
            content["model"]["vocab"] = {marked.get(piece, piece): number for piece, number in vocab.items()}
        else:  # Unigram: pieces with their scores
            content["model"]["vocab"] = [[marked.get(piece, piece), score] for piece, score in vocab]
        if content["model"].get("unk_token") in marked:
            content["model"]["unk_token"] = marked[content["model"]["unk_token"]]
        return tokenizers.Tokenizer.from_str(json.dumps(content | {"post_processor": None}))

    def __reduce__(self) -> tuple[type[HuggingFace], tuple[Path, int]]:
        # Pickled by path: another process reads the files again.
        return HuggingFace, (self.path, self.longest_stretch)


def _between_marks(match: re.Match[str]) -> str:
    """Enclose a control token in marks."""
    return _MARK + match[0] + _MARK


def _from_edges(ids: list[int], text: Marked) -> list[Span]:
    """Return the ids of each span of a text whose spans begin and end at control tokens."""
    border_ids = [0]
    # Plain text never gives the id of a control token, so the next such id is the token's own.
    for control in text.control:
        index = ids.index(control, border_ids[-1])
        border_ids += [index, index + 1]
    border_ids.append(len(ids))
    return [(border_ids[start], border_ids[stop]) for start, stop in text.edges or ()]


def _read_json(file: Path) -> JsonObject:
    """Read a JSON object; {} if the file does not exist."""
    return read_object(file) if file.is_file() else {}


def _token_text(token: str | JsonObject | None) -> str | None:
    """Return the text of a token that is stated as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token

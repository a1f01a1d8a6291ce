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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from moe_train.data.tokenizers.tokenizer import Span, Tokenizer, hash_files
from moe_train.machine.files import JsonObject, read_object

_MARK = "\ufdd0"  # a Unicode noncharacter, which no text contains
_OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files next to tokenizer.json that an export includes if they exist, in the order in which the identity hashes them."""

ADDITIONAL_TEMPLATES = "additional_chat_templates"
"""Name of the folder next to tokenizer.json with further chat templates, such as `tool_use.jinja`."""


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

    def __init__(self, path: str | Path) -> None:
        """Read the tokenizer.

        Args:
            path: The `tokenizer.json`, or the folder that contains it.

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
        self.files = (main, *(file for file in other_files if file.is_file()), *_additional_templates(directory))
        self.identity = hash_files(self.files)
        try:
            self._plain = tokenizers.Tokenizer.from_file(str(main))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{main} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}") from error
        # A file may contain the padding and truncation settings of the program that saved it.
        self._plain.no_padding()
        self._plain.no_truncation()
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
        self.special_tokens = tuple(token.content for token in self._plain.get_added_tokens_decoder().values() if token.special)
        self.chat_template = _chat_template(directory, settings)
        self.end_tokens = self._end_tokens(directory, settings)
        ids = (self._plain.token_to_id(token) for token in self.end_tokens)
        self.end_ids = tuple(number for number in ids if number is not None)

    def _id(self, name: str) -> int:
        """Return the id of a named token such as `eos_token`."""
        number = self._plain.token_to_id(self.named_tokens[name])
        if number is None:
            raise ValueError(f"the {name} {self.named_tokens[name]!r} of tokenizer_config.json is not in {self.files[0]}")
        return number

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

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without any control token."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of ids; control tokens are omitted, or written by name with `keep_special`."""
        return self._plain.decode(list(ids), skip_special_tokens=not keep_special)

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
        """
        marked = [text.text for text in texts]
        # Where all spans begin and end at control tokens, ids locate them, and the library need not compute character offsets.
        edges = [text.edges for text in texts if text.edges is not None]
        encoded: list[tuple[list[int], list[Span]]] = []
        if len(edges) < len(texts):
            encodings = self._control.encode_batch(marked, add_special_tokens=False)
            for encoding, text in zip(encodings, texts, strict=True):
                encoded.append((encoding.ids, [_touching(encoding, span) for span in text.spans]))
            return encoded
        encodings = self._control.encode_batch_fast(marked, add_special_tokens=False)  # a fifth faster, as it computes no offsets
        for encoding, text, spans in zip(encodings, texts, edges, strict=True):
            ids = encoding.ids
            border_ids = [0]
            # Plain text never gives the id of a control token, so the next such id is the token's own.
            for control in text.control:
                index = ids.index(control, border_ids[-1])
                border_ids += [index, index + 1]
            border_ids.append(len(ids))
            encoded.append((ids, [(border_ids[start], border_ids[stop]) for start, stop in spans]))
        return encoded

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

    def __reduce__(self) -> tuple[type[HuggingFace], tuple[Path]]:
        # Pickled by path: another process reads the files again.
        return HuggingFace, (self.path,)


def _between_marks(match: re.Match[str]) -> str:
    """Enclose a control token in marks."""
    return _MARK + match[0] + _MARK


def _touching(encoding: tokenizers.Encoding, span: Span) -> Span:
    """Return the tokens (first, last + 1) with characters in the span; a token without characters counts as one character long."""
    start, stop = span
    first = _first_token(encoding, range(start, stop))
    if first is None:
        return 0, 0
    last = _first_token(encoding, range(stop - 1, -1, -1))
    assert last is not None, "the first token is in reach of this search"
    # A character may be spread over several byte-level tokens, of which `char_to_token` returns one.
    while first and (chars := encoding.token_to_chars(first - 1)) and chars[0] >= start:
        first -= 1
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) and chars[0] < stop:
        last += 1
    return first, last + 1


def _first_token(encoding: tokenizers.Encoding, positions: Iterable[int]) -> int | None:
    """Return the token of the first of these characters that belongs to one; None if none of them does."""
    for position in positions:
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None


def _read_json(file: Path) -> JsonObject:
    """Read a JSON object; {} if the file does not exist."""
    return read_object(file) if file.is_file() else {}


def _token_text(token: str | JsonObject | None) -> str | None:
    """Return the text of a token that is stated as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(directory: Path, settings: JsonObject) -> str | None:
    """Return the text of the chat template; None if there is none.

    Like transformers, `chat_template.jinja` and the templates in `additional_chat_templates` come before those of
    tokenizer_config.json, which has one, or a list of them with names. Of several, transformers renders the one named `tool_use`
    if there are tools, and the one named `default` otherwise; here both become one template that decides the same way.
    """
    templates: dict[str, str] = {}
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        for entry in stated:
            if isinstance(entry, dict) and "name" in entry:
                templates[entry["name"]] = entry["template"]
    elif isinstance(stated, str):
        templates["default"] = stated
    file = directory / "chat_template.jinja"
    if file.is_file():
        templates = {"default": file.read_text(encoding="utf-8")}
    templates |= {path.stem: path.read_text(encoding="utf-8") for path in _additional_templates(directory)}
    if "tool_use" not in templates:
        return templates.get("default")
    refusal = "{{ raise_exception('there is no chat template for conversations without tools') }}"
    # The signs + keep white space as it stands; a newline at the very end of a template is never written.
    tool_use, default = (templates.get(name, refusal).removesuffix("\n") for name in ("tool_use", "default"))
    return "{%+ if tools +%}" + tool_use + "{%+ else +%}" + default + "{%+ endif +%}"


def _additional_templates(directory: Path) -> list[Path]:
    """Return the files of chat templates with names, in order."""
    return sorted((directory / ADDITIONAL_TEMPLATES).glob("*.jinja"))

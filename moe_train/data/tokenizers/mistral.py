"""Mistral's own tokenizers, read by mistral-common."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_train.data.pictures.rules import PictureRules
from moe_train.data.sound.rules import SoundRules
from moe_train.data.tokenizers.stretches import LONGEST_STRETCH, SPACE, Stretches, words_of_pattern, words_of_vocabulary
from moe_train.data.tokenizers.tokenizer import Tokenizer, hash_files


class Mistral(Tokenizer):
    """A `tekken.json` or `tokenizer.model.v*`. Encoding, chat format and validation are those of mistral-common."""

    chat_template = None  # the chat format is fixed

    def __init__(self, path: str | Path, longest_stretch: int = LONGEST_STRETCH) -> None:
        """Read the tokenizer.

        Args:
            path: The file, or a folder with exactly one such file.
            longest_stretch: Number of characters that are encoded at once (see `stretches`).

        Raises:
            FileNotFoundError: If there is no such file, or more than one.
            ValueError: If mistral-common cannot read the file, or sentencepiece is not installed.
        """
        # Imported here, since only runs with such a tokenizer need mistral-common.
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece
        from mistral_common.tokens.tokenizers.tekken import is_tekken

        self.path = Path(path)
        file = self.path
        if file.is_dir():
            candidates = sorted(entry for entry in file.iterdir() if is_tekken(entry) or is_sentencepiece(entry))
            if len(candidates) != 1:
                names = ", ".join(entry.name for entry in candidates) or "none"
                raise FileNotFoundError(f"{file} should hold one tekken.json or tokenizer.model.v*; found: {names}")
            (file,) = candidates
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}; give a tekken.json or a tokenizer.model.v*")
        self.files = (file,)
        self.identity = hash_files(self.files)
        try:
            # mistral-common's tokenizer, which validates conversations as for fine-tuning.
            self.finetuning = MistralTokenizer.from_file(file, mode=ValidationMode.finetuning)
        except ImportError as error:
            raise ValueError(f"{file} is a sentencepiece model; install sentencepiece, or use tekken.json") from error
        except (MistralCommonException, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a tokenizer that mistral-common reads: {error}") from error
        self._text = self.finetuning.instruct_tokenizer.tokenizer
        self.longest_stretch = longest_stretch
        first_piece = self._text.id_to_piece(self._text.encode("a", bos=False, eos=False)[0])
        self.adds_space = not is_tekken(file) and first_piece.startswith(SPACE)
        """Whether a text is encoded with a space before it."""
        # An attribute shadows the method of the class, so that mistral-common encodes long messages in parts, too.
        vars(self._text)["encode"] = _in_parts(self._text.encode, self._stretches())
        self.vocab_size = self._text.n_words
        self.bos_id = self._text.bos_id
        self.adds_bos = True
        self.eos_id = self._text.eos_id
        self.end_ids = (self.eos_id,)

    def _stretches(self) -> Stretches:
        """Return where the tokenizer's texts may be split."""
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        if isinstance(self._text, Tekkenizer):
            return words_of_pattern(self.longest_stretch, self._text._model._pat_str)
        return words_of_vocabulary(self.longest_stretch, self._text.vocab(), self.adds_space)

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens, which plain text never contains."""
        return frozenset(number for number in range(self.vocab_size) if self._text.is_special(number))

    @functools.cached_property
    def media(self) -> PictureRules | SoundRules | None:
        """How pictures or sound become tokens; None for a tokenizer of text alone."""
        pictures = self.finetuning.instruct_tokenizer.image_encoder
        if pictures is None:
            return self._sound()
        sizes = pictures.image_config
        ids = pictures.special_ids
        return PictureRules(
            sizes.image_patch_size, sizes.spatial_merge_size, sizes.max_image_size, ids.img, ids.img_break, ids.img_end
        )

    def _sound(self) -> SoundRules | None:
        """Return how sound becomes tokens; None for a tokenizer without sound, or with that of a stream."""
        encoder = self.finetuning.instruct_tokenizer.audio_encoder
        if encoder is None:
            return None
        sizes = encoder.audio_config
        spectrogram = sizes.encoding_config
        ids = encoder.special_ids
        if sizes.is_streaming or sizes.chunk_length_s is None or ids.audio is None or ids.begin_audio is None:
            return None
        frames_per_chunk, rest = divmod(sizes.chunk_frames, spectrogram.hop_length)
        if rest or frames_per_chunk % sizes.audio_length_per_tok:
            return None
        return SoundRules(
            *(sizes.sampling_rate, spectrogram.num_mel_bins, spectrogram.hop_length, spectrogram.window_size),
            *(frames_per_chunk, sizes.audio_length_per_tok, ids.audio, ids.begin_audio),
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without any control token.

        Raises:
            ValueError: If a run of white space is too long for the tokenizer's split into words.
        """
        try:
            return self._text.encode(text, bos=False, eos=False)
        except ValueError as error:
            # The tokenizer's regular expression gives up at a very long run of white space; other errors are bugs.
            if "Regex error" not in str(error):
                raise
            longest = max((len(run) for run in re.findall(r"\s+", text)), default=0)
            raise ValueError(
                f"{self.path.name} cannot split the text into words: it has a run of {longest} white-space characters; shorten it"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        # mistral-common has no batched encoding.
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of ids; control tokens are omitted, or written by name with `keep_special`."""
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        policy = SpecialTokenPolicy.IGNORE
        if keep_special:
            policy = SpecialTokenPolicy.KEEP
        return self._text.decode(list(ids), special_token_policy=policy)

    def bytes_of(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes that each id stands for, none for a control token; together they are the texts as UTF-8."""
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        if isinstance(self._text, Tekkenizer):
            return [self._text.id_to_byte_piece(number) for number in ids]
        sentencepiece: Any = self._text  # mistral-common types less of it
        result = []
        for number in ids:
            piece = self._text.id_to_piece(number)
            if sentencepiece._model.is_byte(number):
                result.append(bytes([int(piece[3:-1], 16)]))  # <0x0A>
            else:
                result.append(b"" if number in self.control_ids else piece.replace(SPACE, " ").encode())
        return result

    def as_decoded(self, text: str) -> str:
        """Return a text as `bytes_of` gives it: sentencepiece cannot tell a space from the character that stands for it."""
        return text.replace(SPACE, " ") if self.adds_space else text

    def __reduce__(self) -> tuple[type[Mistral], tuple[Path, int]]:
        # Pickled by path: another process reads the files again.
        return Mistral, (self.path, self.longest_stretch)


def _in_parts(encode: Callable[..., list[int]], stretches: Stretches) -> Callable[..., list[int]]:
    """Return mistral-common's `encode`, which encodes a text without control tokens, such that it encodes long texts in parts."""

    def encode_in_parts(s: str, bos: bool, eos: bool) -> list[int]:
        if len(s) <= stretches.longest:
            return encode(s, bos=bos, eos=eos)
        ids: list[int] = []
        *parts, last = stretches.parts(s)
        for i, part in enumerate(parts):
            ids += encode(part, bos=bos and i == 0, eos=False)
        return ids + encode(last, bos=bos and not parts, eos=eos)

    return encode_in_parts

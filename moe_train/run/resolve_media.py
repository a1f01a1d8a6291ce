"""The sections `vision` and `audio`: the sizes of the tower of `init_from`, and the patches or chunks that a row has room for."""

from __future__ import annotations

from typing import TypeVar

from moe_train import config

_Encoder = TypeVar("_Encoder", config.VisionEncoder, config.AudioEncoder)


def vision_with_encoder(vision: config.Vision, written: config.Config) -> config.Vision:
    """Return the section with the sizes of the tower of `init_from`, and with the patches that a row has room for.

    Raises:
        FileNotFoundError: `init_from` has no files yet, and the section states no sizes.
        ValueError: there is no such tower, or the section states other sizes.
    """
    encoder = _encoder_of(written, vision.encoder, config.VisionEncoder, "vision")
    # Each token of a picture stands for as many patches, so that a row of them has no more.
    patches = vision.patches_per_row or written.train.seq_len * encoder.patches_per_token
    return vision.model_copy(update={"encoder": encoder, "patches_per_row": patches})


def audio_with_encoder(audio: config.Audio, written: config.Config, context: int) -> config.Audio:
    """Return the section with the sizes of the tower of `init_from`, and with the chunks that a row has room for.

    Args:
        audio: the section.
        written: the config.
        context: devices along `context`, which share the chunks of a row.

    Raises:
        FileNotFoundError: `init_from` has no files yet, and the section states no sizes.
        ValueError: there is no such tower, the section states other sizes, or a row is too short for a chunk.
    """
    encoder = _encoder_of(written, audio.encoder, config.AudioEncoder, "audio")
    seq_len = written.train.seq_len
    if seq_len < encoder.tokens_per_chunk:
        raise ValueError(
            f"train.seq_len {seq_len} is less than the {encoder.tokens_per_chunk} tokens of a chunk of sound; raise it"
        )
    chunks = audio.chunks_per_row
    if chunks is None:
        chunks = seq_len // encoder.tokens_per_chunk
        chunks += -chunks % context
    return audio.model_copy(update={"encoder": encoder, "chunks_per_row": chunks})


def _encoder_of(written: config.Config, stated: _Encoder | None, section: type[_Encoder], name: str) -> _Encoder:
    """Return the sizes of the tower of `init_from`, which those that a section states have to equal; `name` is the section's."""
    from moe_train.checkpoint.initial_files import first_files
    from moe_train.weights.external import read_encoder

    files = None if written.init_from is None else first_files(written.init_from)
    if files is not None:
        read = read_encoder(files, section)
        if stated is not None and stated != read:
            raise ValueError(f"{name}.encoder is not that of {files}; leave it out, since init_from determines it")
        return read
    if stated is None:
        raise FileNotFoundError(
            f"init_from {written.init_from}: no such files of a model with a tower for {section.media}; copy it there, or state "
            f"{name}.encoder to plan without it"
        )
    return stated

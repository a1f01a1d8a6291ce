"""Resolve the section `audio`: the sizes of the tower of `init_from`, and the chunks that a row has room for."""

from __future__ import annotations

from moe_train import config


def audio_with_encoder(audio: config.Audio, written: config.Config, context: int) -> config.Audio:
    """Return the section with the sizes of the tower of `init_from`, and with the chunks that a row has room for.

    Args:
        audio: the section.
        written: the config.
        context: devices along `context`, which share the chunks of a row.

    Raises:
        ValueError: there is no such tower, the section states other sizes, or a row is too short for a chunk.
    """
    from moe_train.checkpoint.initial_files import first_files
    from moe_train.weights.external import read_audio_encoder

    encoder = audio.encoder
    files = None if written.init_from is None else first_files(written.init_from)
    if files is not None:
        read = read_audio_encoder(files)
        if encoder is not None and encoder != read:
            raise ValueError(f"audio.encoder is not that of {files}; leave it out, since init_from determines it")
        encoder = read
    if encoder is None:
        raise FileNotFoundError(
            f"init_from {written.init_from}: no such files of a model with an audio tower; copy it there, or state audio.encoder "
            "to plan without it"
        )
    if written.train.seq_len < encoder.tokens_per_chunk:
        raise ValueError(
            f"train.seq_len {written.train.seq_len} is less than the {encoder.tokens_per_chunk} tokens of a chunk of sound; raise "
            "it"
        )
    chunks = audio.chunks_per_row or chunks_in(written, encoder, context)
    return audio.model_copy(update={"encoder": encoder, "chunks_per_row": chunks})


def chunks_in(written: config.Config, encoder: config.AudioEncoder, context: int) -> int:
    """Return the chunks of sound that fit into the tokens of a row, in a multiple of the devices along `context`."""
    chunks = written.train.seq_len // encoder.tokens_per_chunk
    return -(-chunks // context) * context

"""What files must contain of an audio tower and its projector that were trained, stated a second time for the proof alone.

Nothing here comes from `weights.wrappers`. Names are those of transformers (modeling_voxtral.py). Positions are never trained.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_train import config
from moe_train.proof.expected_tensor import ExpectedTensor, Part, ToFile, as_is, one, outputs_last, outputs_one

_TOWER = "audio_tower."
_PROJECTOR = "multi_modal_projector."
_TAPS = 3


def audio_tensors(encoder: config.AudioEncoder, text_dim: int) -> Iterator[ExpectedTensor]:
    """Yield all tensors of an audio tower and its projector that can be trained, in Hugging Face's layout.

    Args:
        encoder: sizes of the tower.
        text_dim: width of the text model.
    """
    D = encoder.tower_dim
    F = encoder.ffn_dim
    for name, module, channels in (("conv1", "first_conv", encoder.num_mel_bins), ("conv2", "second_conv", D)):
        kernel = Part(f"audio.tower.{module}.weight", (), _rows_of_kernel, mixes_factors=True)
        yield ExpectedTensor(f"{_TOWER}{name}.weight", (D, channels, _TAPS), (kernel,))
        yield one(f"{_TOWER}{name}.bias", (D,), f"audio.tower.{module}.bias", (), as_is)
    arrays: tuple[tuple[str, tuple[int, ...], str, ToFile], ...] = (
        ("self_attn_layer_norm.weight", (D,), "attention_norm.scale", as_is),
        ("self_attn_layer_norm.bias", (D,), "attention_norm.bias", as_is),
        ("self_attn.q_proj.weight", (D, D), "attention.q_proj.weight", outputs_last),
        ("self_attn.q_proj.bias", (D,), "attention.q_proj.bias", np.ravel),
        ("self_attn.k_proj.weight", (D, D), "attention.k_proj.weight", outputs_last),
        ("self_attn.v_proj.weight", (D, D), "attention.v_proj.weight", outputs_last),
        ("self_attn.v_proj.bias", (D,), "attention.v_proj.bias", np.ravel),
        ("self_attn.out_proj.weight", (D, D), "attention.o_proj.weight", outputs_one),
        ("self_attn.out_proj.bias", (D,), "attention.o_proj.bias", as_is),
        ("final_layer_norm.weight", (D,), "ffn_norm.scale", as_is),
        ("final_layer_norm.bias", (D,), "ffn_norm.bias", as_is),
        ("fc1.weight", (F, D), "up_proj.weight", outputs_last),
        ("fc1.bias", (F,), "up_proj.bias", as_is),
        ("fc2.weight", (D, F), "down_proj.weight", outputs_last),
        ("fc2.bias", (D,), "down_proj.bias", as_is),
    )
    for layer in range(encoder.num_layers):
        for name, shape, path, to_file in arrays:
            yield one(f"{_TOWER}layers.{layer}.{name}", shape, f"audio.tower.layers.{path}", (layer,), to_file)
    yield one(f"{_TOWER}layer_norm.weight", (D,), "audio.tower.norm.scale", (), as_is)
    yield one(f"{_TOWER}layer_norm.bias", (D,), "audio.tower.norm.bias", (), as_is)
    for name, module, inputs in (("linear_1", "in_proj", encoder.downsampling * D), ("linear_2", "out_proj", text_dim)):
        yield one(f"{_PROJECTOR}{name}.weight", (text_dim, inputs), f"audio.projector.{module}.weight", (), outputs_last)


def _rows_of_kernel(w: np.ndarray) -> np.ndarray:
    """Turn (tap · channel, out) into the rows of a convolution's kernel (out, channel, tap)."""
    return w.reshape(_TAPS, -1, w.shape[-1]).transpose(2, 1, 0).reshape(-1, _TAPS)

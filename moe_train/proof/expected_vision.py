"""What files must contain of a vision tower and its projector that were trained, stated a second time for the proof alone.

Nothing here comes from `weights.wrappers`. Names are those of transformers (modeling_pixtral.py, modeling_mistral3.py,
modeling_llava.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_train import config
from moe_train.proof.expected_tensor import ExpectedTensor, Part, ToFile, as_is, one, outputs_last, outputs_one

_TOWER = "vision_tower.transformer.layers."
_PROJECTOR = "multi_modal_projector."


def vision_tensors(encoder: config.VisionEncoder, text_dim: int) -> Iterator[ExpectedTensor]:
    """Yield all tensors of a vision tower and its projector, in Hugging Face's layout.

    Args:
        encoder: sizes of the tower.
        text_dim: width of the text model.
    """
    D = encoder.tower_dim
    F = encoder.ffn_dim
    P = encoder.patch_size

    def rows_of_kernel(w: np.ndarray) -> np.ndarray:
        """Turn (colour · row · column, out) into the rows of a convolution's kernel (out, colour, row, column)."""
        return w.T.reshape(-1, P)

    kernel = Part("vision.tower.patch_proj.weight", (), rows_of_kernel, mixes_factors=True)
    yield ExpectedTensor("vision_tower.patch_conv.weight", (D, 3, P, P), (kernel,))
    yield one("vision_tower.ln_pre.weight", (D,), "vision.tower.patch_norm.scale", (), as_is)
    matrices: tuple[tuple[str, tuple[int, ...], str, ToFile], ...] = (
        ("attention_norm", (D,), "attention_norm.scale", as_is),
        ("attention.q_proj", (D, D), "attention.q_proj.weight", outputs_last),
        ("attention.k_proj", (D, D), "attention.k_proj.weight", outputs_last),
        ("attention.v_proj", (D, D), "attention.v_proj.weight", outputs_last),
        ("attention.o_proj", (D, D), "attention.o_proj.weight", outputs_one),
        ("ffn_norm", (D,), "ffn_norm.scale", as_is),
        ("feed_forward.gate_proj", (F, D), "ffn.gate_proj.weight", outputs_last),
        ("feed_forward.up_proj", (F, D), "ffn.up_proj.weight", outputs_last),
        ("feed_forward.down_proj", (D, F), "ffn.down_proj.weight", outputs_last),
    )
    for layer in range(encoder.num_layers):
        for name, shape, path, to_file in matrices:
            yield one(f"{_TOWER}{layer}.{name}.weight", shape, f"vision.tower.layers.{path}", (layer,), to_file)
    if encoder.projector_norm:
        yield one(f"{_PROJECTOR}norm.weight", (D,), "vision.projector.norm.scale", (), as_is)
    if encoder.merge_size:
        merger = f"{_PROJECTOR}patch_merger.merging_layer.weight"
        yield one(merger, (D, encoder.patches_per_token * D), "vision.projector.merge_proj.weight", (), outputs_last)
    for name, module, inputs in (("linear_1", "in_proj", D), ("linear_2", "out_proj", text_dim)):
        yield one(f"{_PROJECTOR}{name}.weight", (text_dim, inputs), f"vision.projector.{module}.weight", (), outputs_last)
        if encoder.projector_bias:
            yield one(f"{_PROJECTOR}{name}.bias", (text_dim,), f"vision.projector.{module}.bias", (), as_is)

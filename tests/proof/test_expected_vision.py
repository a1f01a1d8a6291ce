"""Only the parts that a vision tower has are expected: a norm, a merger and biases of the projector are optional."""

from __future__ import annotations

from moe_train import config
from moe_train.proof.expected_vision import vision_tensors


def test_optional_parts_of_the_projector() -> None:
    sizes = {"tower_dim": 8, "ffn_dim": 12, "num_layers": 2, "num_heads": 2, "patch_size": 2, "max_image_size": 8}
    plain = {tensor.name for tensor in vision_tensors(config.VisionEncoder(**sizes), 16)}
    full = config.VisionEncoder(**sizes, projector_bias=True, projector_norm=True, merge_size=2)
    more = {tensor.name.removeprefix("multi_modal_projector.") for tensor in vision_tensors(full, 16)} - plain
    assert len(plain) == 2 + 2 * 9 + 2
    assert {"linear_1.bias", "linear_2.bias", "norm.weight", "patch_merger.merging_layer.weight"} <= more

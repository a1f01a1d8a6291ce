"""Kernels of convolutions become rows of the taps of each channel."""

from __future__ import annotations

import numpy as np

from moe_train.proof.expected_audio import audio_tensors
from tests.commands.audio_wrapper import ENCODER


def test_rows_of_a_kernel_are_those_of_its_taps() -> None:
    conv = next(tensor for tensor in audio_tensors(ENCODER, 24) if tensor.name == "audio_tower.conv1.weight")
    kernel = np.random.default_rng(0).normal(size=conv.shape)
    windows = kernel.transpose(2, 1, 0).reshape(-1, ENCODER.tower_dim)
    assert np.array_equal(conv.parts[0].to_file(windows), kernel.reshape(-1, 3))

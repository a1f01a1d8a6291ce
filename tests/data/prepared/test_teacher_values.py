"""Fewer tokens of a stored prediction."""

from __future__ import annotations

import numpy as np

from moe_train.data.prepared.teacher_values import TeacherValues


def test_what_is_left_out_goes_to_the_tail() -> None:
    logprobs = np.log(np.array([[0.5, 0.2, 0.1]], np.float16))
    values = TeacherValues(np.array([[3, 1, 2]]), logprobs, np.log(np.array([0.2], np.float32)))
    fewer = values.limited(1)
    assert fewer.ids.tolist() == [[3]]
    np.testing.assert_allclose(np.exp(fewer.tail), 0.5, rtol=2e-3)
    assert values.limited(3) is values

"""Instructions and shapes in the text of an HLO module."""

from __future__ import annotations

import pytest

from moe_train.plan import hlo
from moe_train.plan.hlo_text import ArrayShape, computations, num_instructions, operand_shapes, second_element, stated_shapes
from tests.plan.hlo_module import entry


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.count_program("module @jit_step {}")


def test_instructions_are_taken_apart() -> None:
    text = entry("%p = f32[4,2]{1,0} parameter(0)", "%t = (f32[4,2], s4[8]{0}) fusion(%p, (%q)), calls=%a, to_apply={%b, %c}")
    found, name = computations(text)
    parameter, fusion = found[name]
    assert (name, parameter.opcode, parameter.operands, num_instructions(text)) == ("main", "parameter", "0", 2)
    assert (fusion.result, fusion.operands) == ("(f32[4,2], s4[8]{0})", "%p, (%q)")
    assert fusion.called("calls") == ["a"] and fusion.called("to_apply", "calls") == ["a", "b", "c"]


def test_shapes_and_their_bytes() -> None:
    shapes = stated_shapes("(f32[4,2]{1,0}, s4[8], pred[3], f8e4m3fn[2], bf16[])")
    assert [shape.bytes for shape in shapes] == [32, 4, 3, 2, 2]
    assert second_element("((f32[2], bf16[2]), (f32[8], bf16[8]))").strip() == "(f32[8], bf16[8])"


def test_operands_are_stated_or_known_by_name() -> None:
    stated, named = (computations(entry(f"%d = f32[] dot({operands})"))[0]["main"][0] for operands in ("f32[2,3] %a", "%a, %b"))
    known = {"a": [ArrayShape("s8", (5,))], "b": [ArrayShape("f32", (1,)), ArrayShape("f32", (2,))]}
    assert operand_shapes(stated, known) == [ArrayShape("f32", (2, 3))]
    assert operand_shapes(named, known) == [ArrayShape("s8", (5,)), ArrayShape("f32", (1,))]

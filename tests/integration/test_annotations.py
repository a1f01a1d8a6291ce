"""Functions of the model and of the training step state the shapes and dtypes of their arrays.

The import hook of conftest.py checks these annotations while the tests run; an array without a shape would pass unchecked.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from moe_train.model.sharding.specs import spec_of
from moe_train.train.logits import split_chunks

PACKAGE = Path(__file__).parents[2] / "moe_train"
FILES = sorted(str(file.relative_to(PACKAGE)) for folder in ("model", "train") for file in (PACKAGE / folder).rglob("*.py"))

ARRAY_TYPES = {"Array", "ArrayLike", "ndarray"}


def bare_arrays(annotation: ast.AST | None) -> Iterator[str]:
    """Array types in an annotation that no jaxtyping dtype wraps, as `Float[Array, "B T"]` wraps its first argument."""
    if isinstance(annotation, ast.Name | ast.Attribute):
        name = annotation.id if isinstance(annotation, ast.Name) else annotation.attr
        if name in ARRAY_TYPES:
            yield ast.unparse(annotation)
    elif isinstance(annotation, ast.Subscript) and is_shaped(annotation):
        return
    elif annotation is not None:
        for child in ast.iter_child_nodes(annotation):
            yield from bare_arrays(child)


def is_shaped(annotation: ast.Subscript) -> bool:
    """Whether an annotation has the form `Dtype[Array, "shape"]`."""
    arguments = annotation.slice
    if not isinstance(arguments, ast.Tuple) or len(arguments.elts) != 2:
        return False
    shape = arguments.elts[1]
    return isinstance(shape, ast.Constant) and isinstance(shape.value, str)


def faults(source: str) -> list[str]:
    """`line: what`, for every bare array in an argument, a result, a field or a type alias, and every argument without a type."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            named = [argument for argument in arguments if argument is not None and argument.arg not in ("self", "cls")]
            found += [f"{a.lineno}: {node.name}({a.arg}) has no type" for a in named if a.annotation is None]
            for a in named:
                found += [f"{a.lineno}: {node.name}({a.arg}: {bare})" for bare in bare_arrays(a.annotation)]
            found += [f"{node.lineno}: {node.name}(...) -> {bare}" for bare in bare_arrays(node.returns)]
        elif isinstance(node, ast.AnnAssign):
            found += [f"{node.lineno}: {ast.unparse(node.target)}: {bare}" for bare in bare_arrays(node.annotation)]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            found += [f"{node.lineno}: {ast.unparse(node.targets[0])} = {bare}" for bare in bare_arrays(node.value)]
    return sorted(found)


@pytest.mark.parametrize("file", FILES)
def test_arrays_have_shapes(file: str) -> None:
    assert not faults((PACKAGE / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def f(x: jax.Array): ...", "1: f(x: jax.Array)"),
        ("def f(x: Array | None = None): ...", "1: f(x: Array)"),
        ("def f(*, x: np.ndarray): ...", "1: f(x: np.ndarray)"),
        ("def f(*xs: tuple[jax.Array, ...]): ...", "1: f(xs: jax.Array)"),
        ("def f(x): ...", "1: f(x) has no type"),
        ("def f() -> list[Array]: ...", "1: f(...) -> Array"),
        ("def f() -> None:\n    def g(x: Array): ...", "2: g(x: Array)"),
        ("class A(NamedTuple):\n    x: Array", "2: x: Array"),
        ("Loss = Callable[[Array, str], int]", "1: Loss = Array"),
    ],
)
def test_an_array_without_shape_is_found(source: str, fault: str) -> None:
    assert faults(source) == [fault]


@pytest.mark.parametrize(
    "source",
    [
        'def f(self, x: Float[Array, "B T"] | None, *rest: Key[Array, ""]) -> tuple[Int[jax.Array, "B"], int]: ...',
        'Drop = Callable[[Float[Array, "R n"], str], Float[Array, "R n"]]',
        "x: dict[str, int] = {}",
    ],
)
def test_an_array_with_a_shape_is_no_fault(source: str) -> None:
    assert not faults(source)


def test_annotations_are_checked_in_the_model_and_in_the_training_step() -> None:
    with pytest.raises(TypeCheckError):
        spec_of("not an array")  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        split_chunks(jnp.ones(()), 2)

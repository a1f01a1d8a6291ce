"""Adapters of the parameters that hold all experts of a layer, as PEFT keeps them: what is written for families but Mixtral.

Gate and up are one parameter, whose adapter has the ranks of both: A has the rows of gate's A and then those of up's, and B has
gate's columns in the rows of gate and up's in the rows of up, so that the product is what each of them adds. `fused` states how
the experts lie in A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.model.paths import in_layer
from moe_train.weights import names
from moe_train.weights.peft.pieces import DOWN, GATE, UP
from moe_train.weights.serve import AdapterShape

Factors = Callable[[str, tuple[int, int], float], tuple[np.ndarray, np.ndarray]]
"""(path of a module, (repeat, expert), scale in the file) -> A (in, rank) and B (rank, out), with B times what the scale lacks."""
_PARAMETERS = {"mlp.experts.gate_up_proj": (GATE, UP), "mlp.experts.down_proj": (DOWN,)}
"""Names of the parameters within a layer, and the modules in the order of their rows."""


class FusedParameter(NamedTuple):
    """The adapter of one parameter of one layer."""

    target: str
    """Name of the parameter within its layer, for target_parameters."""
    stem: str
    """Names of A and B without their ends."""
    modules: tuple[str | None, ...]
    """Paths of the modules in the order of the parameter's rows; None for one without an adapter."""
    ranks: tuple[int, ...]
    """Rank of each of them; 0 without an adapter."""
    repeat: int
    shape: AdapterShape
    """Rank of an expert, and alpha."""
    num_experts: int
    in_dim: int
    out_dim: int
    """Outputs of each module."""

    @property
    def shape_of_a(self) -> tuple[int, int]:
        """Shape of A in the file."""
        return self.num_experts * self.shape.rank, self.in_dim

    @property
    def shape_of_b(self) -> tuple[int, int]:
        """Shape of B in the file."""
        return len(self.modules) * self.out_dim, self.shape.rank * self.num_experts

    def join(self, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
        """Return A and B of all experts, in the dtype of their factors."""
        scale = self.shape.alpha / self.shape.rank
        a_EJI: np.ndarray | None = None
        b_OJE: np.ndarray | None = None
        first_rank = 0
        for i, (module, rank) in enumerate(zip(self.modules, self.ranks, strict=True)):
            if module is None:
                continue
            outputs = slice(i * self.out_dim, (i + 1) * self.out_dim)
            ranks = slice(first_rank, first_rank + rank)
            first_rank += rank
            for expert in range(self.num_experts):
                a, b = factors(module, (self.repeat, expert), scale)
                if a_EJI is None or b_OJE is None:
                    a_EJI = np.zeros((self.num_experts, self.shape.rank, self.in_dim), a.dtype)
                    b_OJE = np.zeros((len(self.modules) * self.out_dim, self.shape.rank, self.num_experts), a.dtype)
                a_EJI[expert, ranks] = a.T
                b_OJE[outputs, ranks, expert] = b.T
        assert a_EJI is not None and b_OJE is not None, self
        return a_EJI.reshape(self.shape_of_a), b_OJE.reshape(self.shape_of_b)


def fused_parameters(
    model: config.Model, shapes: Mapping[str, AdapterShape], layout: names.TensorLayout
) -> Iterator[FusedParameter]:
    """Yield the fused adapters of a file, layer by layer.

    Args:
        model: the architecture of the base.
        shapes: rank and alpha of the modules with adapters, by path.
        layout: names of the base's modules.
    """
    for position in config.layers(model):
        if not isinstance(position.ffn, config.MoeFfn):
            continue
        prefix = f"base_model.model.{layout.layer.format(l=position.layer)}mlp.experts"
        adapted: dict[str, tuple[str | None, ...]] = {}
        for target, leaves in _PARAMETERS.items():
            paths = (in_layer(position, leaf) for leaf in leaves)
            adapted[target] = tuple(path if path in shapes else None for path in paths)
        present = [target for target, modules in adapted.items() if any(modules)]
        for target in present:
            modules = adapted[target]
            ranks = tuple(shapes[module].rank if module else 0 for module in modules)
            first = next(shapes[module] for module in modules if module)
            # PEFT wraps the first parameter, and then the wrapper of the first for the second.
            is_inner = target == present[0] and len(present) == 2
            yield FusedParameter(
                target=target,
                stem=f"{prefix}.base_layer" if is_inner else prefix,
                modules=modules,
                ranks=ranks,
                repeat=position.repeat,
                # The scale of the first module; the other one's B absorbs a different one.
                shape=AdapterShape(sum(ranks), first.alpha * sum(ranks) / first.rank),
                num_experts=position.ffn.num_experts,
                in_dim=position.ffn.ffn_dim if DOWN in target_modules(target) else model.model_dim,
                out_dim=model.model_dim if DOWN in target_modules(target) else position.ffn.ffn_dim,
            )


def target_modules(target: str) -> tuple[str, ...]:
    """Return our modules that a parameter consists of."""
    return _PARAMETERS[target]

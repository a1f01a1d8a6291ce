"""Explain a step whose loss or gradient is not finite: the layer, the records, and what to try."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_train import config
from moe_train.data.batches.loader import Loader
from moe_train.model.paths import ParameterPath
from moe_train.train.finite import StepFlags, step_flags
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.state import TrainState
from moe_train.train.step import step_key
from moe_train.train.step_definition import StepDefinition

MAX_RECORDS = 6
"""Number of records that are named; `moe-train data trace` prints all."""

_FORWARD = (
    *("embed", "attention_norm", "attention.", "attention", "ffn_norm", "ffn.router", "ffn.gate_proj", "ffn.up_proj"),
    *("ffn.down_proj", "ffn.", "ffn", "final_norm", "head"),
)
"""Beginnings of modules' names in the order in which a layer computes them."""


class FirstFault(NamedTuple):
    """The first thing in a step that is not finite."""

    what: str
    """Such as `the output of layer 3 ffn`."""
    kind: str
    """`weights`, `output`, `loss`, `gradient`, or `none` if all of it is finite."""
    bad_BT: np.ndarray | None = None
    """Positions whose output is not finite; None where it is not known."""


def first_fault(model: config.Model, flags: StepFlags) -> FirstFault:
    """Return what of a step is the first not to be finite: a weight, an output or the loss, or the first gradient of the backward
    pass.

    Args:
        model: the architecture.
        flags: flags of the step, on the host.
    """
    for path, repeat in _first(model, flags.weights, reverse=False):
        return FirstFault(f"the weights {_name(model, path, repeat)}", "weights")
    for path, repeat in _first(model, flags.outputs, reverse=False):
        flag = np.asarray(flags.outputs[path])
        return FirstFault(f"the output of {_name(model, path, repeat)}", "output", ~(flag if repeat is None else flag[repeat]))
    if not flags.loss:
        return FirstFault("the loss, although the output of every layer is finite", "loss")
    for path, repeat in _first(model, flags.gradients, reverse=True):
        return FirstFault(f"the gradient of {_name(model, path, repeat)}", "gradient")
    return FirstFault("", "none")


def _first(model: config.Model, flags: dict[str, Any], reverse: bool) -> Iterable[tuple[str, int | None]]:
    """Yield (path, repeat) of the entries that are not finite, in the order of the forward pass or, reversed, of the backward pass.

    `repeat` is None outside the layers.
    """
    bad: list[tuple[tuple[float, int], str, int | None]] = []
    for path, flag in flags.items():
        array = np.asarray(flag)
        if not path.startswith("stacks."):
            if not array.all():
                bad.append((_rank(model, path, None), path, None))
            continue
        for k in range(len(array)):
            if not array[k].all():
                bad.append((_rank(model, path, k), path, k))
    for _, path, repeat in sorted(bad, key=lambda entry: entry[0], reverse=reverse):
        yield path, repeat


def _rank(model: config.Model, path: str, repeat: int | None) -> tuple[float, int]:
    """Return the place of a module or parameter in the forward pass: (layer, module in the layer)."""
    parsed = _parse(path)
    module = next(i for i, start in enumerate(_FORWARD) if parsed.module.startswith(start))
    if repeat is None:
        return (-1.0 if parsed.module == "embed" else float("inf")), module
    layer = parsed.layer(model, repeat)
    assert layer is not None
    # What leads out of the attention comes after what leads into it.
    return float(layer), 2 * module + parsed.module.endswith("o_proj")


def _parse(path: str) -> ParameterPath:
    """Parse the path of a parameter or of a module, whose own path has no name of an array at its end."""
    is_parameter = path.rpartition(".")[2] in ("weight", "scale", "bias", "lora_a", "lora_b", "codes", "scales")
    return ParameterPath.parse(path if is_parameter else f"{path}.weight")


def _name(model: config.Model, path: str, repeat: int | None) -> str:
    """Return the name of a module or parameter for people: `layer 3 ffn.down_proj`."""
    parsed = _parse(path)
    if repeat is None:
        return parsed.module
    return f"layer {parsed.layer(model, repeat)} {parsed.module}"


class Diagnosis:
    """Explain the steps of a run that are not finite; every process must call it at the same step.

    Args:
        run: the resolved run.
        definition: what a step does.
        loader: the training data.
        base_weights: base weights of what is trained in full together with adapters.
    """

    def __init__(self, run: config.Run, definition: StepDefinition, loader: Loader, base_weights: dict[str, jax.Array]) -> None:
        self._run = run
        self._definition = definition
        self._loader = loader
        self._base_weights = base_weights

    def explain(self, step: int, state: TrainState, batch: Any) -> list[str]:
        """Repeat a step, and return one line each for the layer, the records and what to try.

        Args:
            step: the step that was not finite.
            state: the state now. A step that is not finite changes no weights, but the step after it may have been taken.
            batch: the batch of the step.
        """
        fixed = ModelWeights(state.buffers, state.frozen, self._base_weights)
        # The key of the step is that of the position before it.
        key = step_key(self._definition.dropout_seed, np.int32(step - 1))
        try:
            # The definition and the weights that are used decide the program, which is compiled for this one call.
            flags = jax.device_get(jax.jit(partial(step_flags, self._definition))(state.trainable, fixed, batch, key))
        # Most often the memory, since the state is held meanwhile; whatever it is, it must not end a run that only skips a step.
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            return [f"the step could not be repeated to find the layer ({reason})", self._records(step, None)]
        fault = first_fault(self._run.model, flags)
        where = "" if fault.bad_BT is None else _positions(fault.bad_BT)
        line = f"first that is not finite: {fault.what}{where}"
        if fault.kind == "none":
            line = (
                "repeated with the weights after the following step, every output and gradient is finite, so the weights were at "
                "the edge of what the dtype can hold"
            )
        return [line, self._records(step, fault.bad_BT), f"to try: {self._remedy(fault)}"]

    def _records(self, step: int, bad_BT: np.ndarray | None) -> str:
        """Name the records of a step, or those that are not finite if they are known and not all of them."""
        trace = f"moe-train data trace {self._run.run_dir}/config.yaml --step {step}"
        records: list[str] = []
        some: list[str] = []
        for row in range(self._run.train.batch_size):
            position = 0
            for segment in self._loader.trace(step - 1, row):
                record = f"{segment.file}:{segment.number}"
                records.append(record)
                if bad_BT is not None and bad_BT[row, position : position + segment.length].any():
                    some.append(record)
                position += segment.length
        named = list(dict.fromkeys(some or records))
        total = len(dict.fromkeys(records))
        listed = ", ".join(named[:MAX_RECORDS]) + (", …" if len(named) > MAX_RECORDS else "")
        part = f"{len(named)} of " if len(named) < total else ""
        return f"{part}the {total} records of the step: {listed} ({trace})"

    def _remedy(self, fault: FirstFault) -> str:
        """Return what to try against a fault."""
        dtype = self._run.compute.dtype
        slower = f"lower optimizer.learning_rate ({self._run.optimizer.learning_rate:g})"
        if fault.kind == "weights":
            return f"start again from an earlier checkpoint or from other initial weights, and {slower}"
        wider = ", or compute.dtype float32" if dtype != "float32" else ""
        if fault.bad_BT is not None and 0 < _share(fault.bad_BT) < 0.5:
            return f"look at these records (moe-train data show), and leave them out if they are damaged; else {slower}{wider}"
        guard = "" if self._run.train.spike_guard else ", set train.spike_guard {action: roll_back}"
        clip = "" if self._run.optimizer.max_grad_norm else ", set optimizer.max_grad_norm"
        return f"{slower}{guard}{clip}{wider}"


def _share(bad_BT: np.ndarray) -> float:
    return float(bad_BT.mean())


def _positions(bad_BT: np.ndarray) -> str:
    """Say at how many positions an output is not finite."""
    rows: Sequence[int] = np.flatnonzero(bad_BT.any(axis=1)).tolist()
    return f" (at {int(bad_BT.sum()):,} of {bad_BT.size:,} positions, in {len(rows)} of {len(bad_BT)} rows)"

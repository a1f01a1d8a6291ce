"""Measure how fast a config trains on this hardware: its own training step, on synthetic tokens."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.machine.compiler_options import brief_options
from moe_train.machine.devices import peak_flops
from moe_train.machine.files import JsonObject
from moe_train.machine.huge_pages import grant_huge_pages
from moe_train.machine.mesh import make_mesh, platform, put_batch
from moe_train.model.parameters import initial_parameters, parameters
from moe_train.model.tower_flops import flops_of_run
from moe_train.model.transformer import abstract_model, init_model
from moe_train.run.resolve import resolve
from moe_train.run.self_test import run_self_tests
from moe_train.train.optimizer import make_optimizer_of_any_length
from moe_train.train.state import TrainState, partition, state_of_learned, trained_in_full
from moe_train.train.step import StepMetrics, compile_step
from moe_train.train.step_definition import definition_of

WARM_UP_STEPS = 2
"""Number of steps after the first one that are not timed."""
TIMED_STEPS = 7
"""Number of steps that are timed."""
PROFILED_STEPS = 3
"""Number of further steps that are traced by the profiler, which makes them slower."""


def bench(written: config.Config, begun: float | None = None, profile: Path | None = None) -> JsonObject:
    """Time the training step of a run with random weights, full sequences and uniformly drawn tokens.

    Args:
        written: the config of the run.
        begun: `time.time()` when the command was started; None for now.
        profile: folder for a trace of `PROFILED_STEPS` further steps, as `jax.profiler` writes it; None for no trace.

    Returns:
        `first_step_seconds` is the time from the command to the end of the first step, as of `train`: imports, weights,
        self-tests, compilation and the step; `first_step_cpu_seconds` is the processor time of it, since the process was started.
        `median_step_seconds` is the median of the steps after two more. `share_of_attainable` is the model's FLOP/s over what
        the devices could do (see `attainable`).
    """
    begun = time.time() if begun is None else begun
    run = resolve(written, jax.device_count())
    mesh = make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        run_self_tests(run, lambda line: None)  # `train` reports their errors; here they only take their time
        state, structure, optimizer = random_state(run)
        definition = definition_of(run, structure, optimizer)
        objective = definition.objective
        # A reference model has no adapters, so only modules that are trained in full differ from the frozen weights.
        reference = trained_in_full(state.learned, run.lora) if objective.uses_reference else {}
        base_weights = jax.tree.map(jnp.copy, reference)  # a copy, since the step donates the arrays of the state
        rows = run.train.batch_size // jax.process_count()
        batch = put_batch(objective.batch_type.synthetic(rows, run.train.seq_len, run.model.vocab_size, run.seed), mesh)

        start_time = time.perf_counter()
        step = compile_step(definition, state, batch, base_weights)
        compile_seconds = time.perf_counter() - start_time

        def next_step(state: TrainState) -> tuple[TrainState, StepMetrics]:
            return step(state, batch, base_weights)

        state, first = _time_step(next_step, state)
        first_step_seconds = time.time() - begun
        first_step_cpu_seconds = time.process_time()
        grant_huge_pages()
        timed = []
        for _ in range(WARM_UP_STEPS + TIMED_STEPS):
            state, times = _time_step(next_step, state)
            timed.append(times)
        timed = timed[-TIMED_STEPS:]
        if profile is not None:
            _trace_steps(profile, next_step, state)
        median = statistics.median(times.seconds for times in timed)
        tokens = run.train.batch_size * run.train.seq_len
        # With frozen base weights the step computes no gradients of them, so it takes fewer FLOPs.
        adapters = state.trainable if run.lora else None
        flops = tokens * flops_of_run(run, adapters) / median
        peak, source = peak_flops(list(mesh.devices.flat))
        return {
            "compile_seconds": compile_seconds,
            "first_step_seconds": first_step_seconds,
            "first_step_cpu_seconds": first_step_cpu_seconds,
            "median_step_seconds": median,
            "cpu_seconds_per_step": statistics.median(times.cpu_seconds for times in timed),
            "tokens_per_second": tokens / median,
            "model_flops_per_second": flops,
            "share_of_attainable": None if peak is None else flops / peak,
            "attainable": source,
            "bytes_of_program_per_device": _program_bytes(step),
            "bytes_at_peak": _peak_bytes(mesh),
            "first_loss": first.loss,
            "last_loss": timed[-1].loss,
        }


class _StepTimes(NamedTuple):
    """A step and its loss."""

    seconds: float
    cpu_seconds: float
    loss: float


_Step = Callable[[TrainState], tuple[TrainState, StepMetrics]]


def _time_step(step: _Step, state: TrainState) -> tuple[TrainState, _StepTimes]:
    """Take a step, and return the new state and the time until its loss could be read."""
    start = time.perf_counter()
    cpu_start = time.process_time()
    state, metrics = step(state)
    # Reading the loss waits for the step to finish.
    loss = float(metrics.loss)
    return state, _StepTimes(time.perf_counter() - start, time.process_time() - cpu_start, loss)


def _trace_steps(folder: Path, step: _Step, state: TrainState) -> None:
    """Take further steps, and write what the devices and the host do meanwhile into a folder."""
    with jax.profiler.trace(str(folder)):
        for _ in range(PROFILED_STEPS):
            state, metrics = step(state)
        jax.block_until_ready(metrics)


def random_state(run: config.Run) -> tuple[TrainState, PyTreeDef, optax.GradientTransformation]:
    """Return the state of a run with random weights, the structure of its model, and its optimizer."""
    model = partial(init_model, run.seed, run.model, run.compute, run.lora, run.model_encoder)
    structure, shapes = parameters(abstract_model(run.model, run.compute, run.lora, run.model_encoder))
    optimizer = make_optimizer_of_any_length(run.optimizer)
    trainable, frozen = partition(initial_parameters(model, shapes.keys()), run.lora, run.trained_tower)
    options = brief_options(platform()) or None
    state = jax.jit(lambda params: state_of_learned(params, optimizer), donate_argnums=0, compiler_options=options)(trainable)
    return state._replace(frozen=frozen), structure, optimizer


def _program_bytes(step: jax.stages.Compiled) -> int | None:
    """Return the arguments and temporaries of the compiled step on one device, as the compiler states them."""
    memory = step.memory_analysis()
    if memory is None:
        return None
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _peak_bytes(mesh: jax.sharding.Mesh) -> int:
    """Return the peak memory so far, in bytes: of one device, or of the process on a CPU."""
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        return device.memory_stats()["peak_bytes_in_use"]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage states bytes on macOS and kilobytes elsewhere.
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024

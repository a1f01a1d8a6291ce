"""The metrics of steps, read one step late so that the device never waits for the host to read them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from moe_train import config
from moe_train.machine.devices import peak_flops
from moe_train.model.flops import flops_per_token
from moe_train.model.moe.router import RouterStats
from moe_train.model.parameters import Parameters
from moe_train.model.tower_flops import flops_of_tower
from moe_train.run.chosen_answers import ChosenAnswers
from moe_train.run.goodput import Goodput
from moe_train.run.stopping import Votes
from moe_train.run.writer import Writer
from moe_train.train.optimizer import make_schedule
from moe_train.train.state import TrainState
from moe_train.train.step import StepMetrics

VANISHED_WARNING = 0.1
"""Share of vanished updates from which on a run warns."""


class SpikeEvent(NamedTuple):
    """A step that the spike guard skipped."""

    step: int
    spikes: int
    """Number of spikes so far, this one included."""


class MetricsReader:
    """Read the metrics of steps, count the skipped steps and measure the speed of training in tokens that are no padding."""

    def __init__(self, run: config.Run, mesh: Mesh, trainable: Parameters, total_steps: int, start: int, state: TrainState):
        self._run = run
        self._skipped = int(state.skipped)
        discarded = 0 if state.guard is None else int(state.guard.discarded)
        # Skipped steps that were spikes, or undone by a roll-back, are no reason to stop.
        self._not_finite = self._skipped - discarded
        self.spike: SpikeEvent | None = None
        """The spike at the step that was read last, if it was one."""
        self._sparse_layers = config.sparse_layers(run.model)
        self._positions = run.train.batch_size * run.train.seq_len
        self._flops_per_token = flops_per_token(run.model, run.train.seq_len, trainable if run.lora else None)
        self.units_per_row = 0 if run.media is None else run.media.units_per_row
        """Patches or chunks that the tower computes for each row of the step that is read next."""
        self._peak, self.peak_source = peak_flops(list(mesh.devices.flat))
        # Tabulated once: evaluating the schedule at each step would queue its arithmetic behind the training steps on the device.
        rate = make_schedule(run.optimizer.schedule, run.optimizer.learning_rate, total_steps)
        # In one program: outside of one, each operation of a schedule would be compiled by itself.
        rates = jax.jit(jax.vmap(lambda i: jnp.asarray(rate(i))))
        self._rates = np.asarray(rates(np.arange(total_steps)))
        self._seconds = math.nan
        self._input_wait = math.nan
        self._tokens = math.nan  # tokens of a step that are no padding, averaged like `_seconds`
        self._tower_flops = math.nan  # of the tower for a row of a step, padding included, averaged likewise
        self.finite = True
        self.goodput: Goodput | None = None
        """The stopwatch of the process; None outside a run."""
        self.waited = 0.0
        """Seconds that the loop has waited for batches since the timer was restarted."""
        self._has_warned = False
        self._is_explained = False
        self._first_explanation = ""
        self._chosen_answers = ChosenAnswers(run.objective)
        self.restart_timer(start)

    def read(
        self,
        step: int,
        now: StepMetrics,
        voted: jax.Array,
        newest: StepMetrics,
        writer: Writer,
        explain: Callable[[], list[str]] | None = None,
    ) -> Votes:
        """Wait for the metrics of a step, write them, and return what the processes voted at that step.

        Args:
            step: the step that `now` and `voted` belong to.
            now: metrics of that step, still on the device.
            voted: (2,) int32 on the device, from `stopping.vote`.
            newest: metrics of the most recently started step: either this step or the one after it.
            writer: receives the metrics.
            explain: finds out why the step is not finite, in lines; it is called for the first such step only, since it repeats
                the step. None to leave that out.

        Raises:
            RuntimeError: more than `train.max_skipped_steps` steps were not finite, or a layer dropped too many assignments.
        """
        is_next = newest is not now
        # One transfer for both; the host waits here until that step is finished.
        now, voted = jax.device_get((now, voted))
        # If the newest step is finished too, the time so far covers both.
        # A fast device may already have finished the step after this one.
        ahead = is_next and newest.loss.is_ready()  # type: ignore[attr-defined]
        done = step + ahead
        # A batch type without `segment_ids` states no padding.
        self._tokens_read.append(self._positions if now.tokens is None else int(now.tokens))
        self._tower_read.append(flops_of_tower(self._run, self.units_per_row))
        if done > self._done and step % self._run.metrics.every_steps == 0:
            self._measure_time(done)
        if self.goodput is not None:
            self.goodput.step = step
            self.goodput.write()
        self.finite = bool(now.finite)
        if not now.finite:
            # The device has left the state unchanged; this count only follows it.
            self._skipped += 1
            self._not_finite += 1
            problem = f"loss {now.loss} or gradient norm {now.grad_norm} is not finite"
            writer.say(f"step {step} skipped, {self._not_finite} so far: {problem}")
            self._explain_once(step, writer, explain)
        self._read_spike(step, now, writer)
        self._warn_of_vanished(step, now, writer)
        if not self.usable or step % self._run.metrics.every_steps == 0:
            metrics = self._to_json(step, now)
            writer.train(step, metrics)
            warning = self._chosen_answers.warning(step, metrics)
            if warning is not None:
                writer.say(warning)
        if now.routers is not None:
            check_dropped(step, now.routers, self._run.train, self._sparse_layers)
        self._check_limits(step)
        return Votes(*(bool(vote) for vote in voted))

    def _measure_time(self, done: int) -> None:
        """Take the means of time and tokens since the timer was started, and start it again at the step that is done."""
        seconds = time.perf_counter() - self._since
        self._seconds = seconds / (done - self._done)
        self._input_wait = self.waited / seconds
        self._tokens = sum(self._tokens_read) / len(self._tokens_read)
        self._tower_flops = sum(self._tower_read) / len(self._tower_read)
        self.restart_timer(done)

    def _flops(self) -> float:
        """Return the FLOPs of a step: of tokens that are no padding, and of what the tower computes, padding included."""
        return self._tokens * self._flops_per_token + self._run.train.batch_size * self._tower_flops

    def _check_limits(self, step: int) -> None:
        """Raise RuntimeError if more steps than allowed were not finite, or were spikes."""
        limit = self._run.train.max_skipped_steps
        if self._not_finite > limit:
            raise RuntimeError(
                f"{self._not_finite} steps had a loss or gradient that is not finite, the last one step {step}, and "
                f"train.max_skipped_steps is {limit}; check the data, or lower optimizer.learning_rate (checkpoints are kept)"
                f"{self._first_explanation}"
            )
        guard = self._run.train.spike_guard
        if self.spike is not None and guard is not None and self.spike.spikes > guard.max_events:
            raise RuntimeError(
                f"{self.spike.spikes} steps were spikes, the last one step {step}, and train.spike_guard.max_events is "
                f"{guard.max_events}; check the data, lower optimizer.learning_rate, or raise train.spike_guard.factor "
                "(checkpoints are kept)"
            )

    def _explain_once(self, step: int, writer: Writer, explain: Callable[[], list[str]] | None) -> None:
        """Say why a step is not finite, if it is the first one of this process."""
        if self._is_explained or explain is None:
            return
        self._is_explained = True
        lines = explain()
        self._first_explanation = f"; step {step}: {lines[0]}"
        for line in lines:
            writer.say(f"step {step}: {line}")
        # Repeating the step is no part of the time of the next one.
        self.restart_timer(step)

    @property
    def usable(self) -> bool:
        """Whether the step that was read last was neither a spike nor not finite."""
        return self.finite and self.spike is None

    def _read_spike(self, step: int, now: StepMetrics, writer: Writer) -> None:
        """Say that a step was a spike, and follow the count of skipped steps."""
        self.spike = None
        guard = self._run.train.spike_guard
        if now.spike is None or guard is None or not now.spike.is_spike:
            return
        self.spike = SpikeEvent(step, int(now.spike.spikes))
        self._skipped += 1
        value = now.loss if guard.metric == "loss" else now.grad_norm
        writer.say(
            f"step {step} skipped as a spike, {self.spike.spikes} so far: {guard.metric} {value:.4g} exceeds {now.spike.limit:.4g} "
            f"(median of {guard.window} steps and {guard.factor:g} deviations)"
        )

    def _warn_of_vanished(self, step: int, now: StepMetrics, writer: Writer) -> None:
        """Say once that updates are rounded away, if they are."""
        if now.vanished is None or self._has_warned or float(now.vanished) < VANISHED_WARNING:
            return
        self._has_warned = True
        writer.say(
            f"WARNING: step {step} leaves {now.vanished:.1%} of the weights as they are, since their updates are too small for "
            "bfloat16 (metric vanished_updates); set optimizer.rounding to float32_master or stochastic, or compute.param_dtype to "
            "float32, in a new run_dir"
        )

    def restart_timer(self, step: int) -> None:
        """Restart the timer after `step`, so that a pause before it (an evaluation, a save) is not counted."""
        self._done = step
        self._since = time.perf_counter()
        self.waited = 0.0
        self._tokens_read: list[int] = []
        self._tower_read: list[float] = []

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """Return the next batch and count the time spent waiting for it as `input_wait`.

        `input_wait` is a share of the step's time and an upper bound on the time lost, since the device may be busy meanwhile.
        """
        start_time = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start_time
        return batch

    def _to_json(self, step: int, now: StepMetrics) -> dict[str, Any]:
        """Return the metrics of a step, which was read from the device, as values for JSON."""
        return {
            "loss": float(now.loss),
            **{name: _listed(value) for name, value in now.objective.items()},
            "grad_norm": float(now.grad_norm),
            # A skipped step does not advance the schedule.
            "learning_rate": float(self._rates[step - 1 - self._skipped]),
            "skipped": self._skipped,
            **({} if now.spike is None else {"spikes": int(now.spike.spikes)}),
            **({} if now.vanished is None else {"vanished_updates": float(now.vanished)}),
            "seconds": self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "input_wait": self._input_wait,
            "mfu": None if self._peak is None else self._flops() / self._seconds / self._peak,
            **({} if self.goodput is None else {"goodput": self.goodput.summary().shares["productive"]}),
            **({} if now.routers is None else router_metrics(now.routers)),
        }


def check_dropped(step: int, routers: RouterStats, settings: config.Train, layers: Sequence[int]) -> None:
    """Raise RuntimeError if a layer dropped a larger share of its assignments than allowed.

    Without a capacity the allowed share is zero.

    Args:
        step: the step, for the message.
        routers: statistics of all routers, arrays of (L, …).
        settings: states `max_drop_rate` and `capacity_factor`.
        layers: index in the model of the layer of each router.
    """
    # At least 1, so that a layer of a batch that is all padding does not divide by zero.
    rates_L = np.asarray(routers.dropped) / np.maximum(np.sum(routers.chosen_E, axis=1), 1)
    worst = int(np.argmax(rates_L))
    if rates_L[worst] > (settings.max_drop_rate or 0):
        problem = f"step {step}: layer {layers[worst]} dropped {rates_L[worst]:.2%} of its assignments"
        # Without a capacity every transport is dropless, so any drop is a bug.
        if settings.max_drop_rate is None:
            raise RuntimeError(
                f"{problem} although no capacity is set, which is a bug in the transport; use compute.transport all_gather"
            )
        raise RuntimeError(
            f"{problem}; train.max_drop_rate is {settings.max_drop_rate:.2%}: raise train.capacity_factor "
            f"({settings.capacity_factor:g}), or balance the routers more strongly (loss)"
        )


def router_metrics(routers: RouterStats) -> dict[str, Any]:
    """Return the metrics of a step's `RouterStats`, one value per sparse layer, since a mean would hide a dead layer.

    Args:
        routers: `RouterStats` with arrays of (L, …), where l counts the layers that have a router.

    Returns:
        Among others `load[l][e]`, the share of the assignments of sparse layer l that expert e got; `balance`, E * the largest
        share in the worst layer (1 is even); and `dead_experts[l]`, the share of experts that got less than 1% of an even share.
    """
    load_LE = np.asarray(routers.load_E, np.float64)
    E = load_LE.shape[1]
    return {
        "load_balance_loss": _rounded(routers.load_balance_loss),
        "router_z_loss": _rounded(routers.router_z_loss),
        "router_entropy": _rounded(routers.entropy),
        "dead_experts": _rounded(np.mean(load_LE < 0.01 / E, axis=1)),
        "balance": float(E * load_LE.max()),
        "dropped": [int(n) for n in routers.dropped],
        "load": [_rounded(row) for row in load_LE],
    }


def _listed(value: ArrayLike) -> Any:
    """Return a metric of an objective as a number, or as a list with a number for each layer."""
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else _rounded(array)


def _rounded(xs: ArrayLike) -> list[float]:
    """Round to six digits, which is enough to plot and keeps the files small."""
    return [float(f"{x:.6g}") for x in np.asarray(xs, np.float64)]

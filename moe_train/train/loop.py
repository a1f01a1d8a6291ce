"""A training run, from its config to its last checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import checkpoint, config, config_file, metrics, model_dir
from moe_train.atomic import write_text
from moe_train.checkpoint import About, Base
from moe_train.data.loader import Loader
from moe_train.data.tokenizer import load_tokenizer
from moe_train.mesh import AXES, join_processes, make_mesh, put_batch
from moe_train.model.dispatch import check_transport, transport_in_words, transport_of
from moe_train.model.lora import is_lora
from moe_train.model.moe import RouterStats
from moe_train.model.quantize import unquantized
from moe_train.model.transformer import Parameters, init_model, parameters
from moe_train.plan.fits import check_fits
from moe_train.processes import UNFINISHED
from moe_train.train.evaluate import Drift, evaluate, make_batch_sums, make_drift_sums
from moe_train.train.optimizer import make_optimizer, make_schedule
from moe_train.train.ready import check_ready, settled
from moe_train.train.record import only_one, surroundings, write_event
from moe_train.train.self_test import check_against_all_gather, check_attention, check_grouped_matmul, kernels
from moe_train.train.state import TrainState, create_state, partition
from moe_train.train.step import StepMetrics, compile_step
from moe_train.weights.together import require_shared

FINISHED = 0
"""Exit codes: done; stopped before the end with the state saved (EX_TEMPFAIL of sysexits.h: start me again)."""


def train(run: config.Config) -> int:
    """Train as `run` says, from its newest checkpoint where it has one; FINISHED or UNFINISHED.

    Raises ValueError or FileNotFoundError for what cannot be done as asked, RuntimeError for a fault while running;
    the checkpoints that exist stay in both cases.
    """
    join_processes()
    run = settled(model_dir.resolve(run))
    mesh = make_mesh(run.mesh)
    run = model_dir.with_mesh(run, mesh)
    assert run.model is not None
    check_fits(run, mesh.local_devices[0])
    with jax.set_mesh(mesh), _signals() as asked, contextlib.ExitStack() as leaving:
        check_transport(run.compute.transport)
        # What it learns from, and for how long.
        loader, held_out = _loaders(run)
        total_steps = loader.total_steps(run.train)

        # What is trained. Shapes first, so that no more than one copy of the weights is ever made.
        model = partial(init_model, run.seed, run.model, run.compute, run.lora)
        structure, shapes = parameters(jax.eval_shape(model))
        trainable, frozen = partition(shapes, run.lora)
        optimizer = make_optimizer(run.optimizer, total_steps)

        # From the newest checkpoint, or from the weights of init_from, or from random ones.
        run_dir, first_process = Path(run.run_dir), jax.process_index() == 0
        is_new = not run_dir.exists()
        if not is_new and not run_dir.is_dir():
            raise ValueError(f"run_dir {run_dir} is a file; name a folder")
        if first_process and not is_new:
            leaving.enter_context(only_one(run_dir))
        checkpoints = leaving.enter_context(checkpoint.opened(run_dir, run.checkpoint))
        last = checkpoint.newest(checkpoints)
        changed = {} if last is None else _changes(run, last, loader)
        base, adapter = _base(run, last, bool(frozen)), _adapter(run, last)
        weights: Parameters = {}
        if base is not None and frozen:
            wanted = {path: like for path, like in shapes.items() if not is_lora(path)}
            weights = model_dir.load_parameters(base.source, wanted, base.step)
        originals = {path: x for path, x in weights.items() if path in trainable}
        restored = checkpoint.restore(checkpoints, jax.eval_shape(lambda params: create_state(params, optimizer), trainable))
        if restored is not None:
            state = restored.state
            for step, why in restored.damaged.items() if first_process else ():
                print(
                    f"WARNING: the checkpoint of step {step} is damaged, and was renamed to damaged-{step}: {why}", file=sys.stderr
                )
        elif base is not None and not frozen:
            state = _new_state(model_dir.load_parameters(base.source, trainable, base.step), optimizer)
        else:
            loaded = jax.tree.map(jnp.copy, originals)
            if adapter is not None:
                loaded |= model_dir.load_adapter(adapter, run.model, trainable)
            fresh = jax.jit(lambda: {path: x for path, x in parameters(model())[1].items() if path in trainable.keys() - loaded})()
            state = _new_state(fresh | loaded, optimizer)
        state = state._replace(frozen={path: weights[path] for path in frozen})
        start = int(state.step)
        if start >= total_steps:
            print(f"{run.name}: all {total_steps} steps are done; raise train.steps, epochs or tokens to go on")
            return FINISHED

        # From here on there is something to write down.
        if first_process:
            run_dir.mkdir(parents=True, exist_ok=True)
            if is_new:
                leaving.enter_context(only_one(run_dir))
            write_text(run_dir / "config.yaml", config_file.dump(run))
            write_text(run_dir / "manifest.json", loader.manifest)
        require_shared(run_dir)
        writer = metrics.Writer(run_dir, run.metrics, start_step=start, total_steps=total_steps, write=first_process)
        leaving.enter_context(writer)
        damaged = {} if restored is None else restored.damaged
        story = {"epochs": loader.epochs(total_steps), "changed": changed, "damaged": damaged, "base": base and base._asdict()}
        story |= {"adapter": adapter and adapter._asdict(), "kernels": kernels(run)}
        stopped = leaving.enter_context(_diary(run, run_dir, start, restored is not None, **story))
        sizes = sum(x.size for x in unquantized(shapes).values()), sum(x.size for x in trainable.values())
        _introduce(run, writer.say, loader, sizes, total_steps)
        if restored is not None:
            writer.say(f"continuing after step {start}")
        for key, (then, now) in changed.items():
            writer.say(f"changed since the checkpoint: {key} {then} -> {now}")

        # A kernel that is wrong on this device stops the run before it spoils anything.
        checked = check_attention(run.model, run.compute, run.train.seq_len)
        writer.say(f"self-test of attention: largest relative error {checked:.1e}")
        if isinstance(run.model.ffn, config.MoeFfn):
            writer.say(f"self-test of grouped_matmul: largest relative error {check_grouped_matmul(run.compute):.1e}")
            if (transport := transport_of(run, mesh.shape)) == "ragged_all_to_all":
                writer.say(f"self-test of {transport}: largest relative error {check_against_all_gather(transport):.1e}")

        batches: Any = leaving.enter_context(contextlib.closing(loader.iterate(start)))  # type: ignore[type-var]
        batch = put_batch(next(batches), mesh)
        begun = time.perf_counter()
        run_step = compile_step(run, structure, optimizer, state, batch)
        writer.say(f"compiled the step in {time.perf_counter() - begun:.1f} s")

        held_out_sums, drift = make_batch_sums(structure), None
        if held_out is not None and (drift_batches := _drift_batches(run)) and base is not None:
            drift = Drift(make_drift_sums(structure), originals, drift_batches)
            writer.say(f"routing is compared with the base model's on {drift_batches} held-out batches, a second forward pass each")
        if held_out is not None and start == 0:
            found = evaluate(held_out_sums, state.learned, state.frozen, held_out, mesh, run.evaluation.batches, drift)
            writer.evaluation(0, found)
        best = checkpoint.best_loss(checkpoints)
        figures = _Figures(run, mesh, trainable, total_steps, start, int(state.skipped))
        writer.say(f"MFU is the share of {figures.peak_source}")
        saved_at, late = time.monotonic(), None
        for step in range(start + 1, total_steps + 1):
            state, now = run_step(state, batch)
            every = run.checkpoint.every_minutes
            wishes = asked.reason is not None, every is not None and time.monotonic() - saved_at > 60 * every
            voted = _vote(wishes, mesh)
            if step < total_steps:
                batch = put_batch(figures.awaited(batches), mesh)
            # Figures and votes are read one step late: the device never waits for somebody to read them.
            votes = _Votes() if late is None else figures.read(*late, now, writer)
            late = step, now, voted
            stopped.step = step

            evaluates = held_out is not None and (step % run.evaluation.every_steps == 0 or step == total_steps)
            saves = step % run.checkpoint.every_steps == 0 or step == total_steps
            if not (evaluates or saves or votes.stop or votes.save):
                checkpoint.check_saving(checkpoints)
                continue
            votes = figures.read(*late, now, writer).joined(votes)
            late, held_out_loss = None, None
            saves |= votes.stop or votes.save
            if evaluates and held_out is not None:
                found = evaluate(held_out_sums, state.learned, state.frozen, held_out, mesh, run.evaluation.batches, drift)
                writer.evaluation(step, found)
                held_out_loss = found["loss"]
                if run.checkpoint.keep_best and held_out_loss < best:
                    best, saves = held_out_loss, True
            # After a step that was not finite the weights may be past help: the last good checkpoint is not rotated away.
            if saves and (figures.finite or votes.stop or step == total_steps):
                row, data = step * run.train.batch_size, (loader.identity, base, loader.manifest_hash, adapter)
                about = About(run.model_dump(mode="json"), row, *data)
                checkpoint.save(checkpoints, step, state, about, held_out_loss)
                saved_at = time.monotonic()
            figures.go_on(step)
            if votes.stop and step < total_steps:
                checkpoint.finish_saving(checkpoints)
                stopped.reason = asked.reason or "another process was asked to stop"
                writer.say(f"stopped after step {step} of {total_steps} ({stopped.reason}) and saved; start again to continue")
                return UNFINISHED

        checkpoint.finish_saving(checkpoints)
        writer.say(f"finished {total_steps} steps; the checkpoints are in {run_dir / checkpoint.FOLDER}")
        return FINISHED


# --- before the first step -----------------------------------------------------------------------------------------


def _loaders(run: config.Config) -> tuple[Loader, Loader | None]:
    """(training data, held-out data where the config names some)."""
    if run.data is None or run.data.tokenizer is None:
        raise ValueError("training needs data.train and data.tokenizer; state them")
    assert run.model is not None
    tokenizer = load_tokenizer(run.data.tokenizer)
    check_ready(run, tokenizer)
    both = partial(
        Loader,
        run.data,
        tokenizer=tokenizer,
        seq_len=run.train.seq_len,
        seed=run.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    microbatch = run.train.batch_size // run.train.microbatches
    return both("train", batch_size=run.train.batch_size), both("eval", batch_size=microbatch) if run.data.eval else None


_DECIDED_AT_START = (
    *("seed", "model", "lora", "train.batch_size", "train.seq_len", "compute.param_dtype"),
    *("optimizer.name", "optimizer.min_dim_size_to_factor"),
)
"""Settings that a run cannot change: its checkpoint would not fit, or its batches would be others."""


def _changes(run: config.Config, last: About, loader: Loader) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the checkpoint's, {key: (then, now)}. Raises ValueError where one must not."""
    before = config.Config.model_validate_json(json.dumps(last.config))  # an older version's lacks what has since been added
    then, now = (config_file.flat(each.model_dump(mode="json")) for each in (before, run))
    changed = {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}
    for key, (old, new) in changed.items():
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _DECIDED_AT_START):
            raise ValueError(f"{key} is {new}, but {run.run_dir} was started with {old}; set it back, or choose another run_dir")
    if (last.base is None) != (run.init_from is None):
        theirs = last.config["init_from"]
        raise ValueError(f"init_from is {run.init_from}, but {run.run_dir} was started with {theirs}; set it back")
    if last.data != loader.identity:
        raise ValueError(
            f"the training data of {run.run_dir} are not those that it was started with, so its position in them (row {last.row}) "
            "means nothing; bring the old files, tokenizer and weights of sources back, or choose another run_dir"
        )
    return changed


def _base(run: config.Config, last: About | None, frozen: bool) -> Base | None:
    """The identity of the weights of `init_from`; at a resume that loads them again, checked against the checkpoint."""
    if run.init_from is None:
        if frozen:
            raise ValueError("lora needs init_from: adapters belong to weights that can be loaded again")
        return None
    if last is None:
        return model_dir.base_of(run.init_from)
    assert last.base is not None
    base = last.base._replace(source=run.init_from)
    if frozen:
        model_dir.check_base(base)
    return base


def _adapter(run: config.Config, last: About | None) -> Base | None:
    """The identity of the adapter that the run starts from; at a resume the same one as then."""
    if run.lora is None or run.lora.init_from is None:
        return None
    now = model_dir.adapter_of(run.lora.init_from)
    if last is not None and last.adapter is not None and last.adapter.hashes != now.hashes:
        raise ValueError(
            f"the adapter in {run.lora.init_from} has changed since this run started; bring it back, or start a new run_dir"
        )
    return now


def _drift_batches(run: config.Config) -> int:
    """Held-out batches on which the routing is compared with the base model's."""
    assert run.model is not None
    if run.lora is None or not isinstance(run.model.ffn, config.MoeFfn):
        return 0
    stated = run.evaluation.drift_batches
    return 4 if stated is None else stated


def _new_state(trainable: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    return jax.jit(lambda params: create_state(params, optimizer))(trainable)


def _introduce(run: config.Config, say: Callable[[str], None], loader: Loader, sizes: tuple[int, int], total_steps: int) -> None:
    """What a person should know before the first step; sizes: (all, trained) parameters."""
    axes = ", ".join(f"{axis} {n}" for axis, n in jax.sharding.get_mesh().shape.items() if n > 1) or "one device"
    say(f"{run.name}: {sizes[0]:,} parameters, {sizes[1]:,} trained, on {axes}")
    if transport := transport_in_words(run, jax.sharding.get_mesh().shape):
        say(f"experts: {transport}")
    if run.export == "none":
        assert run.model is not None
        say(f"export: none, since no file format has a place for {config.without_format(run.model)}")
    said = f"data: {loader.num_records:,} records in {loader.num_rows:,} rows, {loader.num_tokens:,} tokens"
    left_out = {"dropped": loader.num_dropped, "truncated": loader.num_truncated, "empty": loader.num_empty}
    say("; ".join([said, *(f"{count:,} {what}" for what, count in left_out.items() if count)]))
    say(f"epochs in {total_steps:,} steps: " + ", ".join(f"{n:.2f} of {name}" for name, n in loader.epochs(total_steps).items()))


# --- beside the steps ----------------------------------------------------------------------------------------------


class _Votes(NamedTuple):
    """What some process wants, agreed by all."""

    stop: bool = False
    save: bool = False

    def joined(self, other: _Votes) -> _Votes:
        return _Votes(self.stop or other.stop, self.save or other.save)


def _vote(wishes: tuple[bool, bool], mesh: Mesh) -> jax.Array:
    """(2,) int32 on the device: what any process wishes. All processes read the same, at the same step."""
    mine = np.tile(np.array(wishes, np.int32), (len(mesh.local_devices), 1))
    return _any(jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), mine))


@jax.jit
def _any(wishes: jax.Array) -> jax.Array:
    return jnp.max(wishes, axis=0)


class _Figures:
    """Reads the figures of steps, counts the skipped ones, and knows how fast it goes."""

    def __init__(self, run: config.Config, mesh: Mesh, trainable: Parameters, total_steps: int, start: int, skipped: int):
        assert run.model is not None
        self._run, self._skipped = run, skipped
        self._tokens = run.train.batch_size * run.train.seq_len
        self._flops = self._tokens * metrics.flops_per_token(run.model, run.train.seq_len, trainable if run.lora else None)
        self._peak, self.peak_source = metrics.peak_flops(list(mesh.devices.flat))
        # A table, since a schedule's own arithmetic would queue behind the steps on the device.
        rate = make_schedule(run.optimizer.schedule, run.optimizer.learning_rate, total_steps)
        self._rates = np.asarray(jax.vmap(lambda i: jnp.asarray(rate(i)))(jnp.arange(total_steps)))
        self._seconds, self._input_wait, self.finite = math.nan, math.nan, True
        self.go_on(start)

    def read(self, step: int, now: StepMetrics, voted: jax.Array, newest: StepMetrics, writer: metrics.Writer) -> _Votes:
        """Wait for a step's figures and write them; what the processes voted at that step.

        newest: the figures of the last step that was started, this one or the next.
        Raises RuntimeError where too many steps were not finite.
        """
        is_next = newest is not now
        now, voted = jax.device_get((now, voted))
        ahead = is_next and newest.loss.is_ready()  # type: ignore[attr-defined]  # a device may have been that quick
        done = step + ahead
        if done > self._done and step % self._run.metrics.every_steps == 0:
            self._seconds = (time.perf_counter() - self._since) / (done - self._done)
            self._input_wait = self._waited / (time.perf_counter() - self._since)
            self.go_on(done)
        limit, self.finite = self._run.train.max_skipped_steps, bool(now.finite)
        if not now.finite:
            self._skipped += 1
            writer.say(f"step {step}: loss {now.loss} or gradient {now.grad_norm} is not finite; skipped, {self._skipped} so far")
        if not now.finite or step % self._run.metrics.every_steps == 0:
            writer.train(step, self._figures(step, now))
        if now.routers is not None:
            check_dropped(step, now.routers, self._run.train)
        if self._skipped > limit:
            raise RuntimeError(
                f"{self._skipped} steps had a loss or gradient that is not finite, the last step {step}; train.max_skipped_steps "
                f"is {limit}. The checkpoints from before are kept: look at the data, or lower optimizer.learning_rate"
            )
        return _Votes(*(bool(vote) for vote in voted))

    def go_on(self, step: int) -> None:
        """Time the steps after `step` from now on; a pause before is not to count."""
        self._done, self._since, self._waited = step, time.perf_counter(), 0.0

    def awaited(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time until it is there counts as `input_wait`, a share of the step that is lost at most."""
        begun = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - begun
        return batch

    def _figures(self, step: int, now: StepMetrics) -> dict[str, Any]:
        return {
            "loss": float(now.loss),
            "cross_entropy": float(now.cross_entropy),
            "loss_tokens": int(now.loss_tokens),
            "grad_norm": float(now.grad_norm),
            "learning_rate": float(self._rates[step - 1 - self._skipped]),
            "skipped": self._skipped,
            "seconds": self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "input_wait": self._input_wait,
            "mfu": None if self._peak is None else self._flops / self._seconds / self._peak,
            **({} if now.routers is None else metrics.router_figures(now.routers)),
        }


def check_dropped(step: int, routers: RouterStats, settings: config.Train) -> None:
    """Raise RuntimeError where a layer dropped a larger share of its assignments than `settings` allow: none without a
    capacity."""
    rates_L = np.asarray(routers.dropped) / np.maximum(np.sum(routers.chosen_E, axis=1), 1)
    worst = int(np.argmax(rates_L))
    if rates_L[worst] > (settings.max_drop_rate or 0):
        said = f"step {step}: layer {worst} dropped {rates_L[worst]:.2%} of its assignments"
        if settings.max_drop_rate is None:
            raise RuntimeError(f"{said} without a capacity: a fault of the transport; try compute.transport all_gather")
        raise RuntimeError(
            f"{said}; train.max_drop_rate is {settings.max_drop_rate:.2%}: raise train.capacity_factor "
            f"({settings.capacity_factor:g}), or balance the routers more (loss)"
        )


@contextlib.contextmanager
def _signals() -> Iterator[SimpleNamespace]:
    """`reason` names the first SIGTERM or SIGINT; the second one has its usual effect. The handlers are the main thread's."""
    asked = SimpleNamespace(reason=None)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        asked.reason = signal.Signals(number).name
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _diary(run: config.Config, run_dir: Path, start: int, resumed: bool, **more: Any) -> Iterator[SimpleNamespace]:
    """Write down in `run.json` how the run starts, and how it stops."""
    digest = hashlib.sha256(config_file.dump(run).encode()).hexdigest()
    write_event(run_dir, "resume" if resumed else "start", start, **surroundings(), config_sha256=digest, **more)
    stopped = SimpleNamespace(step=start, reason="finished")
    try:
        yield stopped
    except BaseException as error:
        with contextlib.suppress(OSError):  # the disk may be full: the error that stopped the run is the one to show
            write_event(run_dir, "stop", stopped.step, reason=f"{type(error).__name__}: {error}")
        raise
    write_event(run_dir, "stop", stopped.step, reason=stopped.reason)

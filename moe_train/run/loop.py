"""A training run, from its config to its last checkpoint."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moe_train import config
from moe_train.checkpoint import manager, model_dir
from moe_train.checkpoint.manager import About
from moe_train.config import yaml_file
from moe_train.data.batches.loader import Loader
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.evaluate.held_out import evaluate
from moe_train.evaluate.loss import make_batch_sums
from moe_train.evaluate.routing import Drift, make_drift_sums
from moe_train.machine.files import write_text
from moe_train.machine.mesh import join_processes, make_mesh, put_batch
from moe_train.machine.processes import UNFINISHED
from moe_train.model.moe.transport.choose import check_transport, transport_in_words, transport_of
from moe_train.plan.fits import check_fits
from moe_train.run.metrics import Figures
from moe_train.run.preflight import check_ready, keep_tokenizer, settled
from moe_train.run.record import diary, only_one
from moe_train.run.self_test import check_against_all_gather, check_attention, check_grouped_matmul, chosen_kernels
from moe_train.run.start import Start, starting_state
from moe_train.run.stopping import Votes, signals, vote
from moe_train.run.writer import Writer
from moe_train.train.objectives.choose import objective_of
from moe_train.train.step import compile_step
from moe_train.train.step_definition import definition_of
from moe_train.weights.together import require_shared

FINISHED = 0
"""The exit code of a run that is done; UNFINISHED is that of one to be started again."""


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
    with jax.set_mesh(mesh), signals() as asked, contextlib.ExitStack() as leaving:
        check_transport(run.compute.transport)
        # What it learns from, and for how long.
        loader, held_out = _loaders(run)
        total_steps = loader.total_steps(run.train)

        # From the newest checkpoint, from the weights of init_from, or from random ones.
        run_dir, first_process = Path(run.run_dir), jax.process_index() == 0
        is_new = not run_dir.exists()
        if not is_new and not run_dir.is_dir():
            raise ValueError(f"run_dir {run_dir} is a file; name a folder")
        if first_process and not is_new:
            leaving.enter_context(only_one(run_dir))
        checkpoints = leaving.enter_context(manager.opened(run_dir, run.checkpoint))
        begin = starting_state(run, loader, checkpoints, total_steps)
        state, start = begin.state, int(begin.state.step)
        if first_process:
            for step, why in begin.damaged.items():
                print(
                    f"WARNING: the checkpoint of step {step} is damaged, and was renamed to damaged-{step}: {why}", file=sys.stderr
                )
        if start >= total_steps:
            print(f"{run.name}: all {total_steps} steps are done; raise train.steps, epochs or tokens to go on")
            return FINISHED

        # From here on there is something to write down.
        if first_process:
            run_dir.mkdir(parents=True, exist_ok=True)
            if is_new:
                leaving.enter_context(only_one(run_dir))
            write_text(run_dir / "config.yaml", yaml_file.dump(run))
            write_text(run_dir / "manifest.json", loader.manifest)
            keep_tokenizer(run)
        require_shared(run_dir)
        writer = Writer(run_dir, run.metrics, start_step=start, total_steps=total_steps, write=first_process)
        leaving.enter_context(writer)
        story = {"epochs": loader.epochs(total_steps), "changed": begin.changed, "damaged": begin.damaged}
        story |= {"base": begin.base and begin.base._asdict(), "adapter": begin.adapter and begin.adapter._asdict()}
        stopped = leaving.enter_context(diary(run, run_dir, start, begin.resumed, **story, kernels=chosen_kernels(run)))
        _introduce(run, writer.say, loader, begin, total_steps)

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
        definition = definition_of(run, begin.structure, begin.optimizer)
        run_step = compile_step(definition, state, batch, begin.originals)
        writer.say(f"compiled the step in {time.perf_counter() - begun:.1f} s")

        held_out_sums, drift = make_batch_sums(begin.structure, definition.objective, begin.originals), None
        if held_out is not None and (drift_batches := _drift_batches(run)) and begin.base is not None:
            drift = Drift(make_drift_sums(begin.structure, definition.objective), begin.originals, drift_batches)
            writer.say(f"routing is compared with the base model's on {drift_batches} held-out batches, a second forward pass each")
        if held_out is not None and start == 0:
            found = evaluate(held_out_sums, state.learned, state.frozen, held_out, mesh, run.evaluation.batches, drift)
            writer.evaluation(0, found)
        best = manager.best_loss(checkpoints)
        figures = Figures(run, mesh, state.learned, total_steps, start, int(state.skipped))
        writer.say(f"MFU is the share of {figures.peak_source}")
        saved_at, late = time.monotonic(), None
        for step in range(start + 1, total_steps + 1):
            state, now = run_step(state, batch, begin.originals)
            every = run.checkpoint.every_minutes
            wishes = asked.reason is not None, every is not None and time.monotonic() - saved_at > 60 * every
            voted = vote(wishes, mesh)
            if step < total_steps:
                batch = put_batch(figures.awaited(batches), mesh)
            # Figures and votes are read one step late: the device never waits for somebody to read them.
            votes = Votes() if late is None else figures.read(*late, now, writer)
            late = step, now, voted
            stopped.step = step

            evaluates = held_out is not None and (step % run.evaluation.every_steps == 0 or step == total_steps)
            saves = step % run.checkpoint.every_steps == 0 or step == total_steps
            if not (evaluates or saves or votes.stop or votes.save):
                manager.check_saving(checkpoints)
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
                row, data = step * run.train.batch_size, (loader.identity, begin.base, loader.manifest_hash, begin.adapter)
                about = About(run.model_dump(mode="json"), row, *data)
                manager.save(checkpoints, step, state, about, held_out_loss)
                saved_at = time.monotonic()
            figures.go_on(step)
            if votes.stop and step < total_steps:
                manager.finish_saving(checkpoints)
                stopped.reason = asked.reason or "another process was asked to stop"
                writer.say(f"stopped after step {step} of {total_steps} ({stopped.reason}) and saved; start again to continue")
                return UNFINISHED

        manager.finish_saving(checkpoints)
        writer.say(f"finished {total_steps} steps; the checkpoints are in {run_dir / manager.FOLDER}")
        if run.export == "all":
            writer.say(f"for other tools: moe-train export {run_dir} {run_dir}-hf{' --merge' if run.lora else ''}")
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
        batch_type=objective_of(run.objective).batch_type,
    )
    microbatch = run.train.batch_size // run.train.microbatches
    return both("train", batch_size=run.train.batch_size), both("eval", batch_size=microbatch) if run.data.eval else None


def _drift_batches(run: config.Config) -> int:
    """Held-out batches on which the routing is compared with the base model's."""
    assert run.model is not None
    if run.lora is None or not isinstance(run.model.ffn, config.MoeFfn):
        return 0
    stated = run.evaluation.drift_batches
    return 4 if stated is None else stated


def _introduce(run: config.Config, say: Callable[[str], None], loader: Loader, begin: Start, total_steps: int) -> None:
    """What a person should know before the first step."""
    axes = ", ".join(f"{axis} {n}" for axis, n in jax.sharding.get_mesh().shape.items() if n > 1) or "one device"
    say(f"{run.name}: {begin.sizes[0]:,} parameters, {begin.sizes[1]:,} trained, on {axes}")
    if transport := transport_in_words(run, jax.sharding.get_mesh().shape):
        say(f"experts: {transport}")
    if run.export == "none":
        assert run.model is not None
        say(f"export: none, since no file format has a place for {config.without_format(run.model)}")
    said = f"data: {loader.num_records:,} records in {loader.num_rows:,} rows, {loader.num_tokens:,} tokens"
    left_out = {"dropped": loader.num_dropped, "truncated": loader.num_truncated, "empty": loader.num_empty}
    say("; ".join([said, *(f"{count:,} {what}" for what, count in left_out.items() if count)]))
    say(f"epochs in {total_steps:,} steps: " + ", ".join(f"{n:.2f} of {name}" for name, n in loader.epochs(total_steps).items()))
    if begin.resumed:
        say(f"continuing after step {int(begin.state.step)}")
    for key, (then, now) in begin.changed.items():
        say(f"changed since the checkpoint: {key} {then} -> {now}")

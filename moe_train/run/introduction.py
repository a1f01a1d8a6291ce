"""Messages for people before the first step and after the last."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from moe_train import config
from moe_train.checkpoint.initial_files import describe_initial_files
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER
from moe_train.data.records import unread
from moe_train.machine.program import runnable
from moe_train.model.moe.transport.choose import describe_transport
from moe_train.model.paths import ParameterPath
from moe_train.run.inputs import RunInputs
from moe_train.run.start import Start
from moe_train.train.muon import matrix_dims

Say = Callable[[str], None]


def introduce(run: config.Run, say: Say, inputs: RunInputs, begin: Start) -> None:
    """Describe the run before its first step.

    The lines state the model, mesh, transport, files that are not trained, data and epochs, the step at which the run continues,
    and the settings that have changed since the checkpoint. Keys of records that are not read are named.
    """
    mesh_shape = jax.sharding.get_mesh().shape
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh_shape.items() if size > 1) or "one device"
    say(f"{run.name}: {begin.sizes[0]:,} parameters, {begin.sizes[1]:,} trained, on {axes}")
    transport = describe_transport(run, mesh_shape)
    if transport:
        say(f"experts: {transport}")
    if run.export == "none":
        say(f"export: none, since no file format can express {config.without_format(run.model)}")
    for line in _describe_objective(run):
        say(line)
    if len(run.rooms) > 1:
        sizes = ", ".join(map(str, run.rooms))
        unit = "patches" if run.pictures is not None else "chunks"
        say(f"rows have room for {sizes} {unit}, as each step needs: at most {len(run.rooms)} programs of the step are compiled")
    if isinstance(run.optimizer, config.Muon):
        say(describe_muon(run.optimizer, list(begin.state.trainable)))
    for line in describe_initial_files(run.init_from, run.trains_tower) if run.init_from else ():
        say(line)
    loader = inputs.train
    examples = "" if loader.num_examples == loader.num_records else f", {loader.num_examples:,} examples"
    parts = [f"data: {loader.num_records:,} records{examples} in {loader.num_rows:,} rows, {loader.num_tokens:,} tokens"]
    unused = {"dropped": loader.num_dropped, "truncated": loader.num_truncated, "empty": loader.num_empty}
    parts += [f"{count:,} {outcome}" for outcome, count in unused.items() if count]
    say("; ".join(parts))
    if loader.unread:
        say(f"not read: {unread.in_words(loader.unread)}")
    epochs = loader.epochs(inputs.total_steps)
    say(f"{inputs.total_steps:,} steps = {_describe_epochs(epochs)}")
    balance = _describe_balance(run)
    if balance is not None:
        say(balance)
    if begin.resumed:
        say(f"continuing after step {int(begin.state.step)}")
    for change in _changes(begin):
        say(f"changed since the checkpoint: {change}")


def describe_muon(optimizer: config.Muon, trained: Sequence[str]) -> str:
    """Return a line on which trained arrays Muon updates, and which it leaves to AdamW.

    Args:
        optimizer: the section.
        trained: paths of the trained arrays.
    """
    others = [ParameterPath.parse(path) for path in trained if matrix_dims(path) is None]
    line = f"optimizer: Muon orthogonalizes the updates of {len(trained) - len(others):,} arrays of matrices"
    if not others:
        return line
    kinds = ", ".join(sorted({path.kind for path in others}))
    rate = f"learning rate {optimizer.adamw_learning_rate:g}"
    return f"{line}; AdamW ({rate}) takes {len(others):,}, which are no matrices of linear maps: {kinds}"


def _describe_objective(run: config.Run) -> list[str]:
    """Return a line on what a preference run learns from and what it is compared with; none for next-token training."""
    section = run.objective
    if not isinstance(section, config.Preference | config.UnpairedPreference):
        return []
    reference = "no reference"
    if isinstance(section, config.UnpairedPreference) or section.has_reference:
        reference = (
            "compared with the model before training" if run.lora is None else "compared with the model without its adapters"
        )
    lines = [f"objective: {section.name}, {section.loss}, beta {section.beta:g}, {reference}"]
    if isinstance(section, config.Preference):
        lines.append(_LAYOUTS[section.shared_prompt is True])
    return lines


_LAYOUTS = {
    False: "pairs: each answer with a prompt of its own (objective.shared_prompt false)",
    True: "pairs: both answers attend to one prompt, which routers count once (objective.shared_prompt true)",
}
"""The line on the layout of pairs, by whether their answers share a prompt."""


def _describe_balance(run: config.Run) -> str | None:
    """Return a line on the tokens over which the balance loss is taken; None where there is no choice."""
    if not run.loss.load_balance_loss_coef:
        return None
    match run.loss.balance_over:
        case "sequence":
            return "load_balance_loss is that of each row by itself, averaged over their tokens"
        case "microbatch" if run.train.microbatches > 1:
            return (
                f"load_balance_loss is that of each of the {run.train.microbatches} microbatches, averaged over their tokens; "
                "loss.balance_over step balances over the whole step, for a second forward pass"
            )
        case "step" if run.train.microbatches > 1:
            return "load_balance_loss is that of the whole step, whose loads a forward pass counts first"
    return None


def print_damage(begin: Start) -> None:
    """Warn about checkpoints that could not be read, on the stderr of the first process."""
    for step, reason in begin.damaged.items():
        print_warning(f"the checkpoint of step {step} is damaged and was renamed to damaged-{step}: {reason}")


def print_warning(text: str) -> None:
    """Print a warning on the stderr of the first process."""
    if jax.process_index() == 0:
        print(f"WARNING: {text}", file=sys.stderr)


_TRAINING = ("optimizer.", "loss.", "train.", "average.")
"""Beginnings of the keys that change how a step trains."""
_LENGTH = ("train.steps", "train.epochs", "train.tokens")


def print_finished(run: config.Run, begin: Start, total_steps: int) -> None:
    """Say that no steps are left, and list the changed settings that therefore have no effect.

    Raises:
        ValueError: How steps train was changed, so that the run is not the one that is asked for.
    """
    for key, (before, now) in begin.changed.items():
        if key.startswith(_TRAINING) and key not in _LENGTH:
            raise ValueError(
                f"{key} is {now}, but the run in {run.run_dir} is finished, and was last trained with {before}; choose another "
                f"run_dir to train with {now}, or raise train.steps to continue with it"
            )
    print(f"{run.name}: all {total_steps} steps are done; raise train.steps, train.epochs or train.tokens to continue")
    if jax.process_index() == 0:
        for change in _changes(begin):
            print(
                f"WARNING: changed since the checkpoint, but without effect, since the run is finished: {change}", file=sys.stderr
            )


def conclude(run: config.Run, say: Say, total_steps: int) -> None:
    """Say where the checkpoints are and which command exports them."""
    say(f"finished {total_steps} steps; the checkpoints are in {Path(run.run_dir) / CHECKPOINTS_FOLDER}")
    if run.export == "all":
        merge = " --merge" if run.lora else ""
        say(runnable(f"to use the model in other tools: moe-train export {run.run_dir} {run.run_dir}-hf{merge}"))


def _describe_epochs(epochs: dict[str, float]) -> str:
    """Format how often sources are seen, such as "0.08 epochs of a.jsonl, 3.00 of b.jsonl"."""
    counts = [f"{count:.2f}" for count in epochs.values()]
    if len(counts) > 1 and len(set(counts)) == 1:
        return f"{counts[0]} epochs of all {len(counts)} sources"
    first, *others = (f"{count} epochs of {name}" for count, name in zip(counts, epochs, strict=True))
    return ", ".join([first, *(other.replace(" epochs of ", " of ", 1) for other in others)])


def _changes(begin: Start) -> list[str]:
    return [f"{key} {before} -> {now}" for key, (before, now) in begin.changed.items()]

"""The answer of `moe-train plan`: ranked ways to run on hardware that need not be present, and why the others lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.machine.devices import DEVICES
from moe_train.machine.files import write_text
from moe_train.plan import search
from moe_train.plan.choice import Choice, Price, model_choice, price_of
from moe_train.plan.compile import check_installed
from moe_train.plan.describe import describe_mesh
from moe_train.plan.topology import Topology
from moe_train.plan.weights import axis_sizes


class Answer(NamedTuple):
    """The ranked choices for a run on a topology."""

    topology: Topology
    stated: Choice | None
    """The run as it was stated; None if its mesh does not have the topology's number of devices."""
    choices: list[Choice]
    """The best choice of each mesh, best first."""
    considered: int
    """Number of choices that were modelled."""
    fitting: int
    """Number of those that fit into memory."""
    price: Price
    initial_files: tuple[str, ...] = ()
    """Lines about what of the initial files is not trained, such as a tower that takes no memory on devices."""

    @property
    def best(self) -> Choice | None:
        """The best choice; None if nothing fits."""
        if self.choices and self.choices[0].fits:
            return self.choices[0]
        return None


class PlanOptions(NamedTuple):
    """Options of a plan."""

    compile_best: int = 1
    """Compile choices until this many fit; 0 to rank by the model alone."""
    compile_only: bool = False
    """Compile the run as it is and search for no other choice."""
    free_batch: bool = False
    """Whether the batch size may change."""
    by: search.RankBy = "speed"
    """Whether to rank by speed or by received bytes."""
    price: float | None = None
    """Dollars per chip and hour; None for the list price."""


def rank_and_compile(
    run: config.Run, topology: Topology, options: PlanOptions, say: Callable[[str], None] = lambda _: None
) -> Answer:
    """Rank the ways to train `run` on `topology` and compile the best few, or compile the run as it is.

    Args:
        run: the resolved run.
        topology: the hardware, which need not be present.
        options: what to rank by and how much to compile.
        say: receives a line of progress before each compilation.

    Raises:
        ValueError: no mesh of the topology divides the model; `compile_only` is set and the run's mesh does not have the
            topology's size; or the compiler is not installed.
    """
    if options.compile_best or options.compile_only:
        check_installed(topology)
    price = price_of(DEVICES[topology.device], options.price)
    mesh_devices = math.prod(axis_sizes(run.mesh).values())
    if options.compile_only:
        if mesh_devices != topology.num_devices:
            raise ValueError(
                f"mesh ({describe_mesh(run.mesh)}) has {mesh_devices} devices, but {topology.name} has {topology.num_devices}; set "
                "one axis to -1, or leave out --compile-only to have a mesh chosen"
            )
        choice = search.compile_choice(model_choice(run, topology), topology)
        return Answer(topology, choice, [choice], 1, int(choice.fits), price)
    stated_choice = model_choice(run, topology) if mesh_devices == topology.num_devices else None
    modelled, faults = search.model_all_choices(run, topology, options.free_batch)
    if not modelled:
        fault = _most_common_fault(faults, run, topology)
        raise ValueError(f"no mesh of {topology.name}'s {topology.num_devices} devices can train this run: {fault}")
    considered = len(modelled)
    fitting = sum(choice.fits for choice in modelled)
    if options.compile_best:
        modelled = search.confirm(modelled, topology, options.compile_best, say, options.by)
    best = search.best_of_meshes(modelled, options.by)
    return Answer(topology, stated_choice, best, considered, fitting, price)


def _most_common_fault(faults: list[str], run: config.Run, topology: Topology) -> str:
    """Return the most common fault, or why no batch could be formed if no mesh was even tried."""
    if not faults:
        # Enough for at least one mesh; several slices need a replica in each.
        smallest = topology.num_devices if topology.num_slices == 1 else topology.num_slices
        return f"batch_size {run.train.batch_size} is divisible by none of them; use a multiple of {smallest}, or --batch any"
    return max(set(faults), key=faults.count)


def best_config(answer: Answer, written: config.Config) -> config.Config:
    """Return the best choice as a complete config that `moe-train train` accepts.

    Args:
        answer: the plan.
        written: the config as the user wrote it; its model, mesh, compute and train sections are replaced.

    Raises:
        ValueError: nothing fits.
    """
    if answer.best is None:
        raise ValueError(
            f"nothing fits on {answer.topology.name}, so there is no config to write; use more devices or a smaller model"
        )
    run = answer.best.run
    return written.model_copy(update={"model": run.model, "mesh": run.mesh, "compute": run.compute, "train": run.train})


def write_hlo(answer: Answer, path: Path) -> None:
    """Write the optimized HLO of the best choice that was compiled. Raises ValueError if none was."""
    for choice in answer.choices:
        if choice.compiled is not None:
            write_text(path, choice.compiled.hlo)
            return
    raise ValueError(f"nothing was compiled, so there is no program to write to {path}; leave out --no-compile")

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
from moe_train.plan.compile import check_installed
from moe_train.plan.search import Choice
from moe_train.plan.topology import Topology
from moe_train.plan.weights import axis_sizes


class Answer(NamedTuple):
    """The ranked choices for a run on a topology."""

    topology: Topology
    given: Choice | None
    """The run as it was stated; None if its mesh does not have the topology's number of devices."""
    choices: list[Choice]
    """The best choice of each mesh, best first."""
    considered: int
    """Number of choices that were modelled."""
    fitting: int
    """Number of those that fit into memory."""
    price: float | None
    """Dollars per chip and hour; None if unknown."""
    priced: str
    """The source of the price, in words."""

    @property
    def best(self) -> Choice | None:
        """The best choice; None if nothing fits."""
        return self.choices[0] if self.choices and self.choices[0].fits else None


class Options(NamedTuple):
    """Options of a plan."""

    compile_best: int = 1
    """Compile choices until this many fit; 0 to rank by the model alone."""
    compile_only: bool = False
    """Compile the run as it is and search for no other choice."""
    free_batch: bool = False
    """Whether the batch size may change."""
    by: search.By = "speed"
    """Whether to rank by speed or by received bytes."""
    price: float | None = None
    """Dollars per chip and hour; None for the list price."""


def plan(run: config.Run, topology: Topology, options: Options, say: Callable[[str], None] = lambda _: None) -> Answer:
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
    dollars, priced = search.price_of(DEVICES[topology.device], options.price)
    fits_topology = math.prod(axis_sizes(run.mesh).values()) == topology.num_devices
    if options.compile_only:
        if not fits_topology:
            raise ValueError(
                f"mesh ({search.in_words(run.mesh)}) is of {math.prod(axis_sizes(run.mesh).values())} devices, but {topology.name} "
                f"has {topology.num_devices}; set one axis to -1, or leave --compile-only out to have a mesh chosen"
            )
        choice = search.compiled(search.model_choice(run, topology), topology)
        return Answer(topology, choice, [choice], 1, int(choice.fits), dollars, priced)
    stated_choice = search.model_choice(run, topology) if fits_topology else None
    modelled, faults = search.choices(run, topology, options.free_batch)
    if not modelled:
        fault = _most_common_fault(faults, run, topology)
        raise ValueError(f"no mesh of {topology.name}'s {topology.num_devices} devices takes this run: {fault}")
    considered = len(modelled)
    fitting = sum(choice.fits for choice in modelled)
    if options.compile_best:
        modelled = search.confirm(modelled, topology, options.compile_best, say, options.by)
    best = search.best_of_meshes(modelled, options.by)
    return Answer(topology, stated_choice, best, considered, fitting, dollars, priced)


def _most_common_fault(faults: list[str], run: config.Run, topology: Topology) -> str:
    """Return the most common fault, or why no batch could be formed if no mesh was even tried."""
    if not faults:
        smallest = topology.num_devices if topology.num_slices == 1 else topology.num_slices
        return f"batch_size {run.train.batch_size} divides over none of them; use a multiple of {smallest}, or --batch any"
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
        raise ValueError(f"nothing fits on {answer.topology.name}, so there is no config to write")
    run = answer.best.run
    changes = {key: getattr(run, key) for key in ("model", "mesh", "compute", "train")}
    return written.model_copy(update=changes)


def write_hlo(answer: Answer, path: Path) -> None:
    """Write the optimized HLO of the best choice that was compiled. Raises ValueError if none was."""
    for choice in answer.choices:
        if choice.compiled is not None:
            write_text(path, choice.compiled.hlo)
            return
    raise ValueError(f"nothing was compiled, so there is no program to write to {path}; leave --no-compile out")

"""What `moe-train plan` answers: the choices for a run on hardware that is not here, ranked, and why the others lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.config import yaml_file
from moe_train.machine.devices import DEVICES
from moe_train.machine.files import write_text
from moe_train.plan import search
from moe_train.plan.compile import check_installed
from moe_train.plan.search import Choice
from moe_train.plan.topology import Topology, parse
from moe_train.plan.weights import axis_sizes


class Answer(NamedTuple):
    """The best first; `choices` has one of each mesh."""

    topology: Topology
    given: Choice | None
    """The run as it was stated, where its mesh is of this hardware."""
    choices: list[Choice]
    considered: int
    fitting: int
    price: float | None
    priced: str

    @property
    def best(self) -> Choice | None:
        """None where nothing fits."""
        return self.choices[0] if self.choices and self.choices[0].fits else None


def plan(
    run: config.Config,
    topology: str,
    *,
    compile_best: int = 1,
    compile_only: bool = False,
    free_batch: bool = False,
    by: search.By = "speed",
    price: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Rank the ways to train `run` on `topology`, and compile the best few; with `compile_only`, the run as it is.

    Raises ValueError for a topology that does not exist, a model that no mesh of it divides, or a compiler that is missing.
    """
    place = parse(topology)
    if compile_best or compile_only:
        check_installed(place)
    run = resolved(run)
    dollars, priced = search.price_of(DEVICES[place.device], price)
    if compile_only:
        choice = search.compiled(search.model_choice(whole(run, place), place), place)
        return Answer(place, choice, [choice], 1, int(choice.fits), dollars, priced)
    given = search.model_choice(whole(run, place), place) if _covers(run.mesh, place) else None
    found, faults = search.choices(run, place, free_batch)
    if not found:
        raise ValueError(f"no mesh of {place.name}'s {place.num_devices} devices takes this run: {_commonest(faults, run, place)}")
    considered, fitting = len(found), sum(choice.fits for choice in found)
    if compile_best:
        found = search.confirm(found, place, compile_best, say, by)
    return Answer(place, given, search.best_of_meshes(found, by), considered, fitting, dollars, priced)


def resolved(run: config.Config) -> config.Config:
    """The run with its architecture; a stated one is taken as it is, since the weights need not be here."""
    return run if run.model is not None else model_dir.resolve(run)


def whole(run: config.Config, topology: Topology) -> config.Config:
    """The run with the devices of `topology` in place of an axis of -1. Raises ValueError where they do not divide."""
    sizes = axis_sizes(run.mesh)
    stated = math.prod(abs(size) for size in sizes.values())
    if -1 in sizes.values() and topology.num_devices % stated == 0:
        sizes = {axis: topology.num_devices // stated if size == -1 else size for axis, size in sizes.items()}
    elif -1 in sizes.values() or stated != topology.num_devices:
        raise ValueError(
            f"mesh ({search.in_words(run.mesh)}) is of {stated} devices, but {topology.name} has {topology.num_devices}; "
            f"set one axis to -1, or leave --compile-only out to have a mesh chosen"
        )
    here = run.model_copy(update={"mesh": config.Mesh.model_validate(sizes)})
    assert here.model is not None
    config.check_model(here, here.model)
    config.check_batch(here)
    return here


def _covers(mesh: config.Mesh, topology: Topology) -> bool:
    sizes = axis_sizes(mesh).values()
    stated = math.prod(abs(size) for size in sizes)
    return topology.num_devices % stated == 0 if -1 in sizes else stated == topology.num_devices


def _commonest(faults: list[str], run: config.Config, topology: Topology) -> str:
    if not faults:
        smallest = topology.num_devices if topology.num_slices == 1 else topology.num_slices
        return f"batch_size {run.train.batch_size} divides over none of them; use a multiple of {smallest}, or --batch any"
    return max(set(faults), key=faults.count)


def write_config(answer: Answer, path: Path) -> None:
    """The best choice as a complete config, that `moe-train train` takes. Raises ValueError where nothing fits."""
    if answer.best is None:
        raise ValueError(f"nothing fits on {answer.topology.name}, so there is no config to write to {path}")
    write_text(path, yaml_file.dump(answer.best.run))


def write_hlo(answer: Answer, path: Path) -> None:
    """The optimized program of the best choice that was compiled."""
    for choice in answer.choices:
        if choice.compiled is not None:
            write_text(path, choice.compiled.hlo)
            return
    raise ValueError(f"nothing was compiled, so there is no program to write to {path}; leave --no-compile out")

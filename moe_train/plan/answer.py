"""What `moe-train plan` answers: the choices for a run on hardware that is not here, ranked, and why the others lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.machine.devices import DEVICES, GIB
from moe_train.machine.files import write_text
from moe_train.plan import search
from moe_train.plan.compile import check_installed
from moe_train.plan.search import Choice
from moe_train.plan.topology import Topology
from moe_train.plan.weights import axis_sizes

SHOWN = 12
"""Meshes in the table; JSON has all."""


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


class Options(NamedTuple):
    """What is asked of a plan."""

    compile_best: int = 1
    """Choices to compile until that many fit; 0 to rank by the model alone."""
    compile_only: bool = False
    """Compile the run as it is and choose nothing."""
    free_batch: bool = False
    """Whether the batch size may change."""
    by: search.By = "speed"
    price: float | None = None
    """Dollars per chip and hour; None for the list price."""


def plan(run: config.Run, topology: Topology, options: Options, say: Callable[[str], None] = lambda _: None) -> Answer:
    """Rank the ways to train `run` on `topology` and compile the best few, or compile the run as it is.

    Raises ValueError where no mesh of the topology divides the model, where the run's own mesh is not of the topology's size
    and nothing else is asked for, or where the compiler is missing.
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
    given = search.model_choice(run, topology) if fits_topology else None
    found, faults = search.choices(run, topology, options.free_batch)
    if not found:
        fault = _commonest(faults, run, topology)
        raise ValueError(f"no mesh of {topology.name}'s {topology.num_devices} devices takes this run: {fault}")
    considered, fitting = len(found), sum(choice.fits for choice in found)
    if options.compile_best:
        found = search.confirm(found, topology, options.compile_best, say, options.by)
    best = search.best_of_meshes(found, options.by)
    return Answer(topology, given, best, considered, fitting, dollars, priced)


def _commonest(faults: list[str], run: config.Run, topology: Topology) -> str:
    if not faults:
        smallest = topology.num_devices if topology.num_slices == 1 else topology.num_slices
        return f"batch_size {run.train.batch_size} divides over none of them; use a multiple of {smallest}, or --batch any"
    return max(set(faults), key=faults.count)


# --- as JSON -------------------------------------------------------------------------------------------------------


def as_json(answer: Answer) -> dict[str, Any]:
    """Keys are stable: what a program may build on."""
    place, best = answer.topology, answer.best
    return {
        "topology": {
            "name": place.name,
            "device": place.device,
            "slices": place.num_slices,
            "chips": place.num_chips,
            "devices": place.num_devices,
            "hbm_bytes_per_device": search.device_limit(place),
        },
        "price": {"dollars_per_chip_hour": answer.price, "source": answer.priced},
        "considered": answer.considered,
        "fitting": answer.fitting,
        "given": None if answer.given is None else choice_as_json(answer, answer.given),
        "best": None if best is None else choice_as_json(answer, best),
        "choices": [choice_as_json(answer, choice) for choice in answer.choices],
    }


def choice_as_json(answer: Answer, choice: Choice) -> dict[str, Any]:
    place, run, compiled = answer.topology, choice.run, choice.compiled
    reference = answer.best
    found: dict[str, Any] = {
        "mesh": run.mesh.model_dump(),
        "transport": choice.transport,
        "remat": run.compute.remat,
        "batch_size": run.train.batch_size,
        "microbatches": run.train.microbatches,
        "fits": choice.fits,
        "memory_bytes": {**choice.memory._asdict(), "total": choice.memory.total},
        "received_bytes": {"network": choice.work.network_bytes, "dcn": choice.work.dcn_bytes},
        "received_bytes_per_token": choice.received_per_token(place.num_devices),
        "flows": [flow._asdict() for flow in choice.flows],
        "model_flops": choice.work.model_flops,
        "flops": choice.work.flops,
        "hbm_bytes": choice.work.hbm_bytes,
        "seconds": {**choice.time._asdict(), "step": choice.time.step},
        "binds": choice.time.binds,
        "tokens_per_second": choice.tokens_per_second,
        "mfu": share_of_peak(choice, place),
        "dollars_per_billion_tokens": search.dollars_per_billion(choice, place, answer.price),
        "compiled": None,
        "why_not": None if choice is reference else search.why(choice, reference or choice),
    }
    if compiled is not None:
        found["compiled"] = {
            "bytes_per_device": compiled.bytes_per_device,
            "received_bytes": compiled.network_bytes,
            "seconds": compiled.compile_seconds,
            "memory_error": choice.memory.total / compiled.bytes_per_device - 1,
            "received_error": _error(choice.received, compiled.network_bytes),
        }
    elif choice.refused is not None:
        found["compiled"] = {"refused": choice.refused}
    return found


def _error(modelled: float, counted: float) -> float:
    return modelled / counted - 1 if counted else float(modelled > 0)


def share_of_peak(choice: Choice, place: Topology) -> float:
    """Model FLOPs over what the device could do in the step: an upper bound on MFU."""
    peak = DEVICES[place.device].flops[choice.run.compute.dtype] / place.devices_per_chip
    return choice.work.model_flops / peak / choice.time.step


def best_config(answer: Answer, written: config.Config) -> config.Config:
    """The best choice as a complete config, that `moe-train train` takes. Raises ValueError where nothing fits."""
    if answer.best is None:
        raise ValueError(f"nothing fits on {answer.topology.name}, so there is no config to write")
    run = answer.best.run
    changes = {key: getattr(run, key) for key in ("model", "mesh", "compute", "train")}
    return written.model_copy(update=changes)


def write_hlo(answer: Answer, path: Path) -> None:
    """The optimized program of the best choice that was compiled."""
    for choice in answer.choices:
        if choice.compiled is not None:
            write_text(path, choice.compiled.hlo)
            return
    raise ValueError(f"nothing was compiled, so there is no program to write to {path}; leave --no-compile out")


# --- for people ----------------------------------------------------------------------------------------------------


def introduction(answer: Answer) -> list[str]:
    """Lines above the table."""
    place, device = answer.topology, DEVICES[answer.topology.device]
    chips = f"{place.num_chips} chips" + (f", {place.num_devices} devices" if place.devices_per_chip > 1 else "")
    price = answer.priced if answer.price is None else f"{answer.price:g} dollars per chip and hour ({answer.priced})"
    lines = [f"{place.name}: {chips} of {device.hbm_bytes / GIB:.1f} GiB; {price}"]
    if answer.considered > 1:
        lines.append(f"{answer.considered} choices modelled, {answer.fitting} fit; the best of each mesh, in order")
    return lines


def rows(answer: Answer) -> list[dict[str, str]]:
    """The table: one row a mesh."""
    found = []
    for choice in answer.choices[:SHOWN]:
        dollars = search.dollars_per_billion(choice, answer.topology, answer.price)
        run, reference = choice.run, answer.best
        found.append(
            {
                "mesh": search.in_words(run.mesh),
                "transport": choice.transport or "-",
                "remat": run.compute.remat,
                "batch": f"{run.train.batch_size}" + (f" / {run.train.microbatches}" if run.train.microbatches > 1 else ""),
                "HBM GiB": f"{choice.memory.total / GIB:.2f}",
                "compiled": _compiled(choice),
                "step s": f"{choice.time.step:.3f}",
                "tokens/s": f"{choice.tokens_per_second:,.0f}",
                "MFU at most": f"{share_of_peak(choice, answer.topology):.0%}",
                "GB received": f"{choice.received / 1e9:.1f}",
                "MB a token": f"{choice.received_per_token(answer.topology.num_devices) / 1e6:.2f}",
                "binds": choice.time.binds,
                "$ per 1e9 tokens": "-" if dollars is None else f"{dollars:,.0f}",
                "why not": "" if choice is reference else search.why(choice, reference or choice),
            }
        )
    return found


def _compiled(choice: Choice) -> str:
    if choice.refused is not None:
        return "refused"
    if choice.compiled is None:
        return "-"
    return f"{choice.compiled.bytes_per_device / GIB:.2f}, {choice.compiled.network_bytes / 1e9:.1f} GB"


def conclusion(answer: Answer) -> list[str]:
    """Lines below the table."""
    best, given, place = answer.best, answer.given, answer.topology
    if best is None:
        closest = answer.choices[0]
        said = [f"nothing fits on {place.name}: the closest is {search.in_words(closest.run.mesh)}, {search.why(closest, closest)}"]
        if found := search.smallest_that_fits(closest.run, place):
            larger, choice = found
            said.append(
                f"it fits on {larger.name} ({larger.num_chips} chips): {search.in_words(choice.run.mesh)}, remat full, "
                f"one sequence on each device at a time, {choice.memory.total / GIB:.2f} GiB"
            )
        else:
            said.append(f"nor does it on any larger slice or number of hosts of {place.device}: use a device with more memory")
        return said
    lines = ["Times are the roofline's, and so the least; a real step is longer."]
    if lost := answer.choices[SHOWN:]:
        slow = [choice for choice in lost if choice.fits]
        fates = [f"{len(slow)} are slower"] if slow else []
        if large := [choice for choice in lost if not choice.fits]:
            fates.append(f"{len(large)} do not fit, by {min(c.bytes_per_device - c.limit for c in large) / GIB:.2f} GiB and more")
        lines.append(f"{len(lost)} more meshes: {', '.join(fates)} (--json has them)")
    if best.compiled is None:
        lines.append("confirmed: no (the model alone)")
    else:
        memory, moved = best.memory.total / best.compiled.bytes_per_device - 1, _error(best.received, best.compiled.network_bytes)
        lines.append(f"confirmed by the compiler: the model is off by {memory:+.1%} in memory and {moved:+.1%} in bytes received")
    if given is not None and given is not best and (differs := search.changed(given.run, best.run)):
        settings = " ".join(f"{key}={value}" for key, value in differs.items())
        lines.append(f"the config as it is: {search.why(given, best)}; better: {settings}")
    return lines

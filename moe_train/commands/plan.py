"""`moe-train plan`: the resolved run on hardware that is not here."""

from __future__ import annotations

import math
from collections.abc import Callable

from moe_train import config
from moe_train.plan import answer as planning
from moe_train.plan import search
from moe_train.plan.topology import Topology, parse
from moe_train.run.resolve import resolve


def plan(
    written: config.Config,
    topology: str,
    *,
    compile_best: int = 1,
    compile_only: bool = False,
    free_batch: bool = False,
    by: search.By = "speed",
    price: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> planning.Answer:
    """Rank the ways to train `written` on `topology`; see `planning.plan`. Needs neither weights nor a tokenizer."""
    place = parse(topology)
    if not compile_only:
        written = written.model_copy(update={"mesh": _starting_mesh(written.mesh, place)})
    run = resolve(written, place.num_devices)
    options = planning.Options(compile_best, compile_only, free_batch, by, price)
    return planning.plan(run, place, options, say)


def _starting_mesh(mesh: config.Mesh, topology: Topology) -> config.Mesh:
    """The stated mesh, or one device where its axis of -1 cannot be filled from `topology`: a mesh is chosen anyway."""
    sizes = mesh.model_dump().values()
    if -1 in sizes and topology.num_devices % math.prod(abs(size) for size in sizes):
        return config.Mesh(context=max(mesh.context, 1))
    return mesh

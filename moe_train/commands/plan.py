"""`moe-train plan`: plan a resolved run on hardware that need not be present."""

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
    """Rank the ways to train `written` on `topology`; see `planning.plan`.

    Neither weights nor a tokenizer are needed.

    Args:
        written: the config as the user wrote it.
        topology: a name such as v5p:4x4x4; see `plan.topology`.
        compile_best: compile choices until this many fit; 0 to rank by the model alone.
        compile_only: compile the run as it is and search for no other choice.
        free_batch: whether the batch size may change.
        by: whether to rank by speed or by received bytes.
        price: dollars per chip and hour; None for the list price.
        say: receives a line of progress before each compilation.
    """
    place = parse(topology)
    if not compile_only:
        written = written.model_copy(update={"mesh": _starting_mesh(written.mesh, place)})
    run = resolve(written, place.num_devices)
    options = planning.Options(compile_best, compile_only, free_batch, by, price)
    return planning.plan(run, place, options, say)


def _starting_mesh(mesh: config.Mesh, topology: Topology) -> config.Mesh:
    """Return the stated mesh, or one device if its axis of -1 cannot be filled: a mesh is chosen by the search anyway."""
    sizes = mesh.model_dump().values()
    if -1 in sizes and topology.num_devices % math.prod(abs(size) for size in sizes):
        return config.Mesh(context=max(mesh.context, 1))
    return mesh

"""`moe-train plan`: plan a resolved run on hardware that need not be present."""

from __future__ import annotations

import math
from collections.abc import Callable

from moe_train import config
from moe_train.checkpoint.initial_files import describe_initial_files
from moe_train.plan import answer as planning
from moe_train.plan.topology import Topology, parse_topology
from moe_train.run.resolve import resolve


def plan_run(
    written: config.Config,
    topology: str,
    options: planning.PlanOptions,
    say: Callable[[str], None] = lambda _: None,
) -> planning.Answer:
    """Rank the ways to train `written` on `topology`; see `planning.rank_and_compile`.

        answer = moe_train.plan_run(moe_train.load_config("run.yaml"), "v5p:4x4x4")

    Neither weights nor a tokenizer are needed.

    Args:
        written: the config as the user wrote it.
        topology: a name such as v5p:4x4x4; see `plan.topology`.
        options: how choices are searched, ranked and compiled.
        say: receives a line of progress before each compilation.

    Raises:
        ValueError: the topology is not known, or the config is invalid.
    """
    place = parse_topology(topology)
    if not options.compile_only:
        written = written.model_copy(update={"mesh": _starting_mesh(written.mesh, place)})
    run = resolve(written, place.num_devices)
    answer = planning.rank_and_compile(run, place, options, say)
    lines = describe_initial_files(run.init_from, run.trains_tower) if run.init_from else []
    return answer._replace(initial_files=tuple(lines))


def _starting_mesh(mesh: config.Mesh, topology: Topology) -> config.Mesh:
    """Return the stated mesh, or one device if its axis of -1 cannot be filled, since the search tries all meshes anyway."""
    sizes = mesh.model_dump().values()
    # abs(-1) is 1, so this is the product of the stated axes.
    if -1 in sizes and topology.num_devices % math.prod(abs(size) for size in sizes):
        return config.Mesh(context=max(mesh.context, 1))
    return mesh

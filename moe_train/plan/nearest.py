"""Find what fits if a run does not: other settings on the same devices, or more devices of the same kind."""

from __future__ import annotations

import math

from moe_train import config
from moe_train.plan.choice import Choice, model_choice
from moe_train.plan.describe import changed_settings
from moe_train.plan.search import meshes, model_all_choices
from moe_train.plan.topology import Topology, parse_topology, slice_shapes


def nearest_that_fits(run: config.Run, topology: Topology, limit: int) -> Choice | None:
    """Return the choice within `limit` bytes per device that changes least, or None.

    Choices are compared by the number of settings that differ from the run's, then by speed.
    """
    possible, _ = model_all_choices(run, topology)
    fitting = [choice for choice in possible if choice.memory.total <= limit]
    return min(fitting, key=lambda c: (len(changed_settings(run, c.run)), -c.tokens_per_second), default=None)


def smallest_that_fits(run: config.Run, topology: Topology, chips: int = 4096) -> tuple[Topology, Choice] | None:
    """Find the first larger slice (or number of hosts) of the same device on which the run fits.

    The run is modelled with one sequence on each device at a time and everything rematerialized.

    Args:
        run: the resolved run.
        topology: the topology that is too small.
        chips: the largest number of chips to consider.

    Returns:
        (the topology, the choice), or None if no topology of up to `chips` chips fits.
    """
    for name in larger_topologies(topology, chips):
        candidate_topology = parse_topology(name)
        for mesh in meshes(run.model_copy(update={"mesh": config.Mesh()}), candidate_topology):
            # Further replicas hold the same weights again, so they fit nowhere where the same devices along `fsdp` do not.
            if mesh.data > candidate_topology.num_slices or mesh.tensor > 1:
                continue
            batch = {"batch_size": mesh.data * mesh.fsdp * mesh.expert, "microbatches": 1}
            compute = run.compute.model_copy(update={"transport": "auto", "remat": "full"})
            train = run.train.model_copy(update=batch)
            candidate = run.model_copy(update={"mesh": mesh, "compute": compute, "train": train})
            try:
                config.check_model(candidate, run.model)
                choice = model_choice(candidate, candidate_topology)
            except ValueError:  # the mesh does not divide the model
                continue
            if choice.fits:
                return candidate_topology, choice
    return None


def larger_topologies(topology: Topology, chips: int) -> list[str]:
    """Return the names of topologies of the same device with more chips than `topology`, smallest first."""
    if topology.platform == "gpu":
        host = f"{topology.device}x8"
        hosts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if topology.num_chips < 8 * n <= chips]
        return [host if n == 1 else f"{n}x{host}" for n in hosts]
    sizes: dict[int, tuple[int, ...]] = {}
    for shape in sorted(slice_shapes(topology.device), key=sum):  # among shapes of equal size, the one closest to a cube
        sizes.setdefault(math.prod(shape), shape)
    # The dims of most models are not divisible by other sizes.
    powers = [n for n in sorted(sizes) if topology.num_chips < n <= chips and n.bit_count() == 1]
    return [f"{topology.device}:{'x'.join(map(str, sizes[n]))}" for n in powers]

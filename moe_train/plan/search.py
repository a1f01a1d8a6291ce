"""Search for the best mesh, transport, rematerialization and batch: model every choice, rank those that fit, compile the best."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Literal

from moe_train import config
from moe_train.model.moe.transport.choose import transports_of
from moe_train.plan import compile as compiler
from moe_train.plan.choice import Choice, model_choice
from moe_train.plan.describe import describe_mesh
from moe_train.plan.topology import Topology
from moe_train.plan.weights import divisions

LARGEST_BATCH = 64
"""The most sequences per device and microbatch that are tried if the batch size is free."""


def meshes(run: config.Run, topology: Topology) -> Iterator[config.Mesh]:
    """Yield every mesh of the topology's devices; the size of `context` stays as the run states it.

    Between TPU slices only `data` is laid, since the other axes would cross the slow network in every layer.

    Raises:
        ValueError: `mesh.context` does not divide the number of devices.
    """
    context = max(run.mesh.context, 1)
    if topology.num_devices % context:
        nearest = next(n for n in range(context, 0, -1) if topology.num_devices % n == 0)
        raise ValueError(
            f"mesh.context {context} does not divide the {topology.num_devices} devices of {topology.name}; use {nearest}"
        )
    slices = topology.num_slices if topology.platform == "tpu" else 1
    for data, fsdp, expert, tensor in divisions(topology.num_devices // context, 4):
        if data % slices == 0:
            yield config.Mesh(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)


def batches(run: config.Run, mesh: config.Mesh, free: bool) -> Iterator[tuple[int, int]]:
    """Yield the possible pairs (batch_size, microbatches).

    Args:
        run: the run, which states the batch.
        mesh: the mesh that the batch is divided over.
        free: whether the batch size may change. If so, powers of two up to `LARGEST_BATCH` sequences per device are tried, in one
            microbatch; otherwise the run's own batch in every division into microbatches.
    """
    replicas = mesh.data * mesh.fsdp * mesh.expert
    if free:
        yield from ((replicas * 2**i, 1) for i in range(LARGEST_BATCH.bit_length()))
        return
    sequences, remainder = divmod(run.train.batch_size, replicas)
    if remainder == 0:
        yield from ((run.train.batch_size, m) for m in range(1, sequences + 1) if sequences % m == 0)


def model_all_choices(run: config.Run, topology: Topology, free_batch: bool = False) -> tuple[list[Choice], list[str]]:
    """Model every choice for a resolved run.

    Returns:
        (the choices that are possible, the faults of those that are not).
    """
    possible = []
    faults = []
    for mesh in meshes(run, topology):
        # Without an expert axis no tokens are exchanged, so the transport makes no difference.
        transports = transports_of(topology.platform) if mesh.expert > 1 else ("auto",)
        for transport, remat in itertools.product(transports, ("full", "minimal")):
            compute = run.compute.model_copy(update={"transport": transport, "remat": remat})
            for batch_size, microbatches in batches(run, mesh, free_batch):
                train = run.train.model_copy(update={"batch_size": batch_size, "microbatches": microbatches})
                candidate = run.model_copy(update={"mesh": mesh, "compute": compute, "train": train})
                try:
                    config.check_model(candidate, run.model)
                    config.check_batch(candidate)
                    possible.append(model_choice(candidate, topology))
                except ValueError as fault:
                    faults.append(str(fault))
    return possible, faults


RankBy = Literal["speed", "bytes"]
"""What choices are ranked by: tokens per second, or received bytes per token."""


def ranked(candidates: list[Choice], by: RankBy = "speed") -> list[Choice]:
    """Sort choices, best first.

    Choices that fit come first, sorted by tokens per second or by received bytes per token, with ties broken by bytes and memory.
    Choices that do not fit follow, sorted by how much memory they need.
    """

    def cost(choice: Choice) -> tuple[float, ...]:
        # Three digits: nearly equal speeds count as a tie, which the received bytes then decide.
        speed = float(f"{choice.tokens_per_second:.3g}")
        bytes_per_token = choice.received / choice.tokens
        if by == "speed":
            return -speed, bytes_per_token, choice.memory.total
        return bytes_per_token, -speed, choice.memory.total

    fitting = [choice for choice in candidates if choice.fits]
    too_large = [choice for choice in candidates if not choice.fits]
    return sorted(fitting, key=cost) + sorted(too_large, key=lambda choice: choice.bytes_per_device)


def best_of_meshes(candidates: list[Choice], by: RankBy = "speed") -> list[Choice]:
    """Return the best choice of each mesh, best first."""
    best_by_mesh: dict[config.Mesh, Choice] = {}
    for choice in ranked(candidates, by):
        best_by_mesh.setdefault(choice.run.mesh, choice)
    return list(best_by_mesh.values())


def confirm(
    candidates: list[Choice], topology: Topology, count: int, say: Callable[[str], None], by: RankBy = "speed"
) -> list[Choice]:
    """Compile the best choices until `count` of them fit, or no choice is left that fits according to the model.

    Args:
        candidates: modelled choices.
        topology: the hardware to compile for.
        count: number of choices that have to fit.
        say: receives a line before each compilation.
        by: what to rank by.

    Returns:
        All of `candidates`, ranked again with what the compiler has counted.
    """
    order = ranked(candidates, by)
    confirmed = 0
    compiled_choices: list[Choice] = []
    for choice in order:
        # Choices that fit come first, so after one that does not there are no others.
        if confirmed == count or not choice.fits:
            break
        say(f"compiling {describe_mesh(choice.run.mesh)} for {topology.name} …")
        choice = compile_choice(choice, topology)
        confirmed += choice.fits
        compiled_choices.append(choice)
    return ranked([*compiled_choices, *order[len(compiled_choices) :]], by)


def compile_choice(choice: Choice, topology: Topology) -> Choice:
    """Return the choice with its compiled step, or marked as refused if the compiler cannot place the program."""
    try:
        return choice._replace(compiled=compiler.compile_config(choice.run, topology))
    except ValueError as fault:
        # Only a lack of memory concerns this choice alone; other errors are raised.
        if "RESOURCE_EXHAUSTED" not in str(fault) and "memory" not in str(fault):
            raise
        return choice._replace(refused=str(fault))

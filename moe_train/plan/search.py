"""Search for the best mesh, transport, rematerialization and batch: model every choice, rank those that fit, compile the best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from moe_train import config
from moe_train.machine.devices import DEVICES, GIB, Device
from moe_train.model.moe.transport.choose import transports_of
from moe_train.plan import compile as compiler
from moe_train.plan.memory import Memory, memory
from moe_train.plan.roofline import Time, Work, time, work
from moe_train.plan.topology import Topology, parse, shapes
from moe_train.plan.traffic import Flow, flows, shape_of
from moe_train.plan.weights import divisions, layout

LARGEST_BATCH = 64
"""The most sequences per device and microbatch that are tried if the batch size is free."""


class Choice(NamedTuple):
    """One way to run, with its costs according to the model."""

    run: config.Run
    """The run with this choice's mesh, transport, remat and batch."""
    memory: Memory
    flows: list[Flow]
    work: Work
    time: Time
    limit: int
    """Bytes of a device that a program may use."""
    compiled: compiler.Compiled | None = None
    """The compiler's figures; None if the choice was not compiled, or refused."""
    refused: str | None = None
    """The compiler's message if it cannot place the program."""

    @property
    def transport(self) -> str | None:
        """The transport of the experts' tokens; None if the device holds all experts, or the model has none."""
        return shape_of(self.run).transport

    @property
    def bytes_per_device(self) -> int:
        """Bytes of memory according to the compiler, or to the model if the choice was not compiled."""
        return self.compiled.bytes_per_device if self.compiled else self.memory.total

    @property
    def fits(self) -> bool:
        """Whether the compiler has not refused the choice and its memory is within the limit."""
        return self.refused is None and self.bytes_per_device <= self.limit

    @property
    def tokens(self) -> int:
        """Tokens of one step, on all devices."""
        return self.run.train.batch_size * self.run.train.seq_len

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all devices at the roofline, an upper bound."""
        return self.tokens / self.time.step

    @property
    def received(self) -> float:
        """Bytes that one device receives in a step."""
        return self.work.network_bytes + self.work.dcn_bytes

    @property
    def memory_error(self) -> float:
        """Relative error of the model's memory against the compiler's; positive if the model estimates more."""
        assert self.compiled is not None
        return self.memory.total / self.compiled.bytes_per_device - 1

    @property
    def received_error(self) -> float:
        """Relative error of the model's received bytes against the compiler's.

        Positive if the model estimates more; 1 if the compiler counts no bytes and the model does.
        """
        assert self.compiled is not None
        counted = self.compiled.network_bytes
        return self.received / counted - 1 if counted else float(self.received > 0)

    def received_per_token(self, devices: int) -> float:
        """Return the received bytes for each token that a device processes.

        Args:
            devices: number of devices over which the step's tokens are divided.
        """
        return self.received / (self.tokens / devices)


def device_limit(topology: Topology) -> int:
    """Return the bytes of HBM that a program may use on one device."""
    return DEVICES[topology.device].hbm_bytes // topology.devices_per_chip


def model_choice(run: config.Run, topology: Topology) -> Choice:
    """Model the costs of a resolved run whose mesh has no -1. Raises ValueError if mesh and model do not fit together."""
    if run.compute.transport == "auto" and run.mesh.expert > 1 and isinstance(run.model.ffn, config.MoeFfn):
        # Resolved here for the topology's platform; later it would be resolved for this process's.
        transport = shape_of(run, topology.platform).transport
        run = run.model_copy(update={"compute": run.compute.model_copy(update={"transport": transport})})
    weight_layout = layout(run)
    transfers = flows(run, weight_layout, topology.platform)
    step_work = work(run, weight_layout, transfers, topology)
    duration = time(step_work, transfers, run, topology, DEVICES[topology.device])
    return Choice(run, memory(run, weight_layout), transfers, step_work, duration, device_limit(topology))


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


def choices(run: config.Run, topology: Topology, free_batch: bool = False) -> tuple[list[Choice], list[str]]:
    """Model every choice for a resolved run.

    Returns:
        (the choices that are possible, the faults of those that are not).
    """
    possible = []
    faults = []
    for mesh in meshes(run, topology):
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


By = Literal["speed", "bytes"]
"""What choices are ranked by: tokens per second, or received bytes per token."""


def ranked(found: list[Choice], by: By = "speed") -> list[Choice]:
    """Sort choices, best first.

    Choices that fit come first, sorted by tokens per second or by received bytes per token, with ties broken by bytes and memory.
    Choices that do not fit follow, sorted by how much memory they need.
    """

    def order(choice: Choice) -> tuple[Any, ...]:
        bytes_per_token = choice.received / choice.tokens
        if not choice.fits:
            return True, choice.bytes_per_device
        # Three digits: nearly equal speeds count as a tie, which the received bytes then decide.
        speed = -float(f"{choice.tokens_per_second:.3g}")
        if by == "speed":
            return False, speed, bytes_per_token, choice.memory.total
        return False, bytes_per_token, speed, choice.memory.total

    return sorted(found, key=order)


def best_of_meshes(found: list[Choice], by: By = "speed") -> list[Choice]:
    """Return the best choice of each mesh, best first."""
    best_by_mesh: dict[config.Mesh, Choice] = {}
    for choice in ranked(found, by):
        best_by_mesh.setdefault(choice.run.mesh, choice)
    return list(best_by_mesh.values())


def confirm(found: list[Choice], topology: Topology, count: int, say: Callable[[str], None], by: By = "speed") -> list[Choice]:
    """Compile the best choices until `count` of them fit, or no choice is left that fits according to the model.

    Args:
        found: modelled choices.
        topology: the hardware to compile for.
        count: number of choices that have to fit.
        say: receives a line before each compilation.
        by: what to rank by.

    Returns:
        All of `found`, ranked again with the compiler's figures.
    """
    order = ranked(found, by)
    confirmed = 0
    compiled_choices: list[Choice] = []
    for choice in order:
        if confirmed == count or not choice.fits:
            break
        say(f"compiling {in_words(choice.run.mesh)} for {topology.name} …")
        choice = compiled(choice, topology)
        confirmed += choice.fits
        compiled_choices.append(choice)
    return ranked([*compiled_choices, *order[len(compiled_choices) :]], by)


def compiled(choice: Choice, topology: Topology) -> Choice:
    """Return the choice with the compiler's figures, or marked as refused if the compiler cannot place the program."""
    try:
        return choice._replace(compiled=compiler.compile_config(choice.run, topology))
    except ValueError as fault:
        # Only a lack of memory concerns this choice alone; other errors are raised.
        if "RESOURCE_EXHAUSTED" not in str(fault) and "memory" not in str(fault):
            raise
        return choice._replace(refused=str(fault))


def why(choice: Choice, best: Choice) -> str:
    """Explain in a few words why `choice` is not the best one; bytes are those received per token."""
    if choice.refused is not None:
        return f"the compiler refuses it: {choice.refused}"
    if not choice.fits:
        return f"does not fit: {_gib(choice.bytes_per_device)} of {_gib(choice.limit)} GiB, {_largest_part(choice.memory)}"
    slower = best.tokens_per_second / choice.tokens_per_second - 1
    ratio = choice.received / choice.tokens / max(best.received / best.tokens, 1e-9)
    if slower < -0.005:
        return f"{-slower:.0%} faster, {ratio:.2f} x the bytes"
    if slower < 0.005:
        return f"as fast, {ratio:.2f} x the bytes"
    return f"{slower:.0%} slower, {ratio:.2f} x the bytes"


def _largest_part(memory: Memory) -> str:
    name, size = max(memory._asdict().items(), key=lambda part: part[1])
    return f"{_gib(size)} of it {NAMES[name]}"


NAMES = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "gradients": "gradients",
    "saved": "saved activations",
    "layer": "the layer at work",
    "loss": "head and logits",
}
"""The parts of `Memory`, as messages call them."""


def in_words(mesh: config.Mesh) -> str:
    """Describe a mesh by its axes of more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.model_dump().items() if size > 1) or "one device"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def nearest_that_fits(run: config.Run, topology: Topology, limit: int) -> Choice | None:
    """Return the choice within `limit` bytes per device that changes least, or None.

    Choices are compared by the number of settings that differ from the run's, then by speed.
    """
    possible, _ = choices(run, topology)
    fitting = [choice for choice in possible if choice.memory.total <= limit]
    return min(fitting, key=lambda c: (len(changed(run, c.run)), -c.tokens_per_second), default=None)


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
    for name in larger(topology, chips):
        candidate_topology = parse(name)
        for mesh in meshes(run.model_copy(update={"mesh": config.Mesh()}), candidate_topology):
            if mesh.data > candidate_topology.num_slices or mesh.tensor > 1:
                continue
            batch = {"batch_size": mesh.data * mesh.fsdp * mesh.expert, "microbatches": 1}
            compute = run.compute.model_copy(update={"transport": "auto", "remat": "full"})
            train = run.train.model_copy(update=batch)
            candidate = run.model_copy(update={"mesh": mesh, "compute": compute, "train": train})
            try:
                config.check_model(candidate, run.model)
                choice = model_choice(candidate, candidate_topology)
            except ValueError:
                continue
            if choice.fits:
                return candidate_topology, choice
    return None


def larger(topology: Topology, chips: int) -> list[str]:
    """Return the names of topologies of the same device with more chips than `topology`, smallest first."""
    if topology.platform == "gpu":
        hosts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if topology.num_chips < 8 * n <= chips]
        return [f"{topology.device}x8" if n == 1 else f"{n}x{topology.device}x8" for n in hosts]
    sizes: dict[int, tuple[int, ...]] = {}
    for shape in sorted(shapes(topology.device), key=sum):  # among shapes of equal size, the one closest to a cube
        sizes.setdefault(math.prod(shape), shape)
    powers = [n for n in sorted(sizes) if topology.num_chips < n <= chips and n & (n - 1) == 0]
    return [f"{topology.device}:{'x'.join(map(str, sizes[n]))}" for n in powers]


def changed(run: config.Run, other: config.Run) -> dict[str, Any]:
    """Return the settings of mesh, transport, remat and batch that differ in `other`, {key.path: value}."""
    differences: dict[str, Any] = {}
    for section in ("mesh", "compute", "train"):
        run_settings = getattr(run, section).model_dump()
        other_settings = getattr(other, section).model_dump()
        differences |= {f"{section}.{key}": other_settings[key] for key in run_settings if run_settings[key] != other_settings[key]}
    if run.compute.transport == "auto":
        differences.pop("compute.transport", None)
    return differences


def share_of_peak(choice: Choice, topology: Topology) -> float:
    """Return the model's FLOPs over what the device could compute during the step: an upper bound on MFU."""
    peak = DEVICES[topology.device].flops[choice.run.compute.dtype] / topology.devices_per_chip
    return choice.work.model_flops / peak / choice.time.step


def dollars_per_billion(choice: Choice, topology: Topology, price: float | None) -> float | None:
    """Return the dollars per 1e9 tokens at the roofline, a lower bound.

    Args:
        choice: the choice.
        topology: states the number of chips.
        price: dollars per chip and hour; None if unknown, and then the result is None too.
    """
    if price is None:
        return None
    return price * topology.num_chips / 3600 / choice.tokens_per_second * 1e9


def price_of(device: Device, stated: float | None) -> tuple[float | None, str]:
    """Return (dollars per chip and hour or None, where the price comes from)."""
    if stated is not None:
        return stated, "--price"
    if device.dollars_per_hour is None:
        return None, "no list price is known; state --price"
    return device.dollars_per_hour, f"list price of {device.priced}"

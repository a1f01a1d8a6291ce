"""The answer of `moe-train plan` for people: a table of choices, with lines above and below it."""

from __future__ import annotations

from moe_train.machine.devices import DEVICES, GIB
from moe_train.plan.answer import Answer
from moe_train.plan.choice import Choice, dollars_per_billion, share_of_peak
from moe_train.plan.describe import changed_settings, describe_mesh, explain
from moe_train.plan.measured_speed import calibrated_speed
from moe_train.plan.nearest import smallest_that_fits

MAX_ROWS = 12
"""Maximum number of meshes in the table; the JSON answer has all of them."""


def introduction(answer: Answer) -> list[str]:
    """Return the lines above the table."""
    topology = answer.topology
    device = DEVICES[answer.topology.device]
    chips = f"{topology.num_chips} chips"
    if topology.devices_per_chip > 1:
        chips += f", {topology.num_devices} devices"
    price = answer.price.source
    if answer.price.dollars_per_hour is not None:
        price = f"{answer.price.dollars_per_hour:g} dollars per chip and hour ({answer.price.source})"
    lines = [f"{topology.name}: {chips} of {device.hbm_bytes / GIB:.1f} GiB; {price}"]
    lines += answer.initial_files
    if answer.considered > 1:
        lines.append(f"{answer.considered} choices modelled, {answer.fitting} fit; the best of each mesh, in order")
    return lines


def rows(answer: Answer) -> list[dict[str, str]]:
    """Return the table, one row per mesh."""
    table = []
    for choice in answer.choices[:MAX_ROWS]:
        dollars = dollars_per_billion(choice, answer.topology, answer.price.dollars_per_hour)
        run = choice.run
        batch = f"{run.train.batch_size}"
        if run.train.microbatches > 1:
            batch += f" / {run.train.microbatches}"
        table.append(
            {
                "mesh": describe_mesh(run.mesh),
                "transport": choice.transport or "-",
                "remat": run.compute.remat,
                "batch": batch,
                "HBM GiB": f"{choice.memory.total / GIB:.2f}",
                "compiled": _describe_compiled(choice),
                "step s": f"{choice.time.step:.3f}",
                "tokens/s": f"{choice.tokens_per_second:,.0f}",
                "as others": _describe_calibrated(choice, answer),
                "MFU at most": f"{share_of_peak(choice, answer.topology):.0%}",
                "GB received": f"{choice.received / 1e9:.1f}",
                "MB a token": f"{choice.received_per_token(answer.topology.num_devices) / 1e6:.2f}",
                "binds": choice.time.binds,
                "$ per 1e9 tokens": "-" if dollars is None else f"{dollars:,.0f}",
                "why not": "" if choice is answer.best else explain(choice, answer.best or choice),
            }
        )
    return table


def _describe_calibrated(choice: Choice, answer: Answer) -> str:
    """Return tokens per second at the share of the peak that others have measured; `-` if nothing is published."""
    speed = calibrated_speed(choice, answer.topology)
    return "-" if speed is None else f"{speed.tokens_per_second:,.0f}"


def _describe_compiled(choice: Choice) -> str:
    """Return the compiler's memory and received bytes in words, `refused`, or `-` for a choice that was not compiled."""
    if choice.refused is not None:
        return "refused"
    if choice.compiled is None:
        return "-"
    return f"{choice.compiled.bytes_per_device / GIB:.2f}, {choice.compiled.network_bytes / 1e9:.1f} GB"


def conclusion(answer: Answer) -> list[str]:
    """Return the lines below the table: what fits, whether the compiler confirmed it, and how to change the config."""
    best = answer.best
    if best is None:
        return _explain_that_nothing_fits(answer)
    lines = ["Times are lower bounds by the roofline model; a real step takes longer."]
    speed = calibrated_speed(best, answer.topology)
    if speed is not None:
        lines.append(f"as others: tokens/s at {speed.measured.share:.0%} of the peak at most, measured for {speed.measured.source}")
    if len(answer.choices) > MAX_ROWS:
        lines.append(_describe_hidden_rows(answer.choices[MAX_ROWS:]))
    if best.compiled is None:
        lines.append("confirmed: no (by the model alone)")
    else:
        lines.append(
            f"confirmed by the compiler: the model is off by {best.memory_error:+.1%} in memory "
            f"and {best.received_error:+.1%} in bytes received"
        )
    stated = answer.stated
    if stated is not None and stated is not best:
        differences = changed_settings(stated.run, best.run)
        if differences:
            settings = " ".join(f"{key}={value}" for key, value in differences.items())
            lines.append(f"the config as it is: {explain(stated, best)}; better: {settings}")
    return lines


def _explain_that_nothing_fits(answer: Answer) -> list[str]:
    """Say how much is missing, and on which larger topology the run fits."""
    topology = answer.topology
    closest = answer.choices[0]
    closest_mesh = describe_mesh(closest.run.mesh)
    lines = [f"nothing fits on {topology.name}: the closest is {closest_mesh}, {explain(closest, closest)}"]
    larger = smallest_that_fits(closest.run, topology)
    if larger is None:
        lines.append(f"no larger slice or number of hosts of {topology.device} fits it either: use a device with more memory")
        return lines
    larger_topology, choice = larger
    lines.append(
        f"it fits on {larger_topology.name} ({larger_topology.num_chips} chips): {describe_mesh(choice.run.mesh)}, remat full, "
        f"one sequence on each device at a time, {choice.memory.total / GIB:.2f} GiB"
    )
    return lines


def _describe_hidden_rows(hidden: list[Choice]) -> str:
    """Summarize the choices that the table leaves out."""
    num_fitting = sum(choice.fits for choice in hidden)
    summaries = []
    if num_fitting:
        summaries.append(f"{num_fitting} are slower")
    if num_fitting < len(hidden):
        least_excess = min(choice.bytes_per_device - choice.limit for choice in hidden if not choice.fits)
        summaries.append(f"{len(hidden) - num_fitting} do not fit, by {least_excess / GIB:.2f} GiB and more")
    return f"{len(hidden)} more meshes: {', '.join(summaries)} (--json has them)"

"""The answer of `moe-train plan` for people: a table of choices, with lines above and below it."""

from __future__ import annotations

from moe_train.machine.devices import DEVICES, GIB
from moe_train.plan import search
from moe_train.plan.answer import Answer
from moe_train.plan.search import Choice

SHOWN = 12
"""Maximum number of meshes in the table; the JSON answer has all of them."""


def introduction(answer: Answer) -> list[str]:
    """Return the lines above the table."""
    topology = answer.topology
    device = DEVICES[answer.topology.device]
    chips = f"{topology.num_chips} chips"
    if topology.devices_per_chip > 1:
        chips += f", {topology.num_devices} devices"
    price = answer.priced
    if answer.price is not None:
        price = f"{answer.price:g} dollars per chip and hour ({answer.priced})"
    lines = [f"{topology.name}: {chips} of {device.hbm_bytes / GIB:.1f} GiB; {price}"]
    if answer.considered > 1:
        lines.append(f"{answer.considered} choices modelled, {answer.fitting} fit; the best of each mesh, in order")
    return lines


def rows(answer: Answer) -> list[dict[str, str]]:
    """Return the table, one row per mesh."""
    table = []
    for choice in answer.choices[:SHOWN]:
        dollars = search.dollars_per_billion(choice, answer.topology, answer.price)
        run = choice.run
        reference = answer.best
        batch = f"{run.train.batch_size}"
        if run.train.microbatches > 1:
            batch += f" / {run.train.microbatches}"
        table.append(
            {
                "mesh": search.in_words(run.mesh),
                "transport": choice.transport or "-",
                "remat": run.compute.remat,
                "batch": batch,
                "HBM GiB": f"{choice.memory.total / GIB:.2f}",
                "compiled": _compiled_in_words(choice),
                "step s": f"{choice.time.step:.3f}",
                "tokens/s": f"{choice.tokens_per_second:,.0f}",
                "MFU at most": f"{search.share_of_peak(choice, answer.topology):.0%}",
                "GB received": f"{choice.received / 1e9:.1f}",
                "MB a token": f"{choice.received_per_token(answer.topology.num_devices) / 1e6:.2f}",
                "binds": choice.time.binds,
                "$ per 1e9 tokens": "-" if dollars is None else f"{dollars:,.0f}",
                "why not": "" if choice is reference else search.why(choice, reference or choice),
            }
        )
    return table


def _compiled_in_words(choice: Choice) -> str:
    """Return the compiler's memory and received bytes in words, `refused`, or `-` for a choice that was not compiled."""
    if choice.refused is not None:
        return "refused"
    if choice.compiled is None:
        return "-"
    return f"{choice.compiled.bytes_per_device / GIB:.2f}, {choice.compiled.network_bytes / 1e9:.1f} GB"


def conclusion(answer: Answer) -> list[str]:
    """Return the lines below the table: what fits, whether the compiler confirmed it, and how to change the config."""
    best = answer.best
    stated_choice = answer.given
    topology = answer.topology
    if best is None:
        closest = answer.choices[0]
        explanation = [
            f"nothing fits on {topology.name}: the closest is {search.in_words(closest.run.mesh)}, {search.why(closest, closest)}"
        ]
        fitting = search.smallest_that_fits(closest.run, topology)
        if fitting:
            larger, choice = fitting
            explanation.append(
                f"it fits on {larger.name} ({larger.num_chips} chips): {search.in_words(choice.run.mesh)}, remat full, "
                f"one sequence on each device at a time, {choice.memory.total / GIB:.2f} GiB"
            )
        else:
            explanation.append(
                f"nor does it on any larger slice or number of hosts of {topology.device}: use a device with more memory"
            )
        return explanation
    lines = ["Times are the roofline's, and so the least; a real step is longer."]
    hidden = answer.choices[SHOWN:]
    if hidden:
        slow = [choice for choice in hidden if choice.fits]
        fates = [f"{len(slow)} are slower"] if slow else []
        too_large = [choice for choice in hidden if not choice.fits]
        if too_large:
            least_excess = min(choice.bytes_per_device - choice.limit for choice in too_large)
            fates.append(f"{len(too_large)} do not fit, by {least_excess / GIB:.2f} GiB and more")
        lines.append(f"{len(hidden)} more meshes: {', '.join(fates)} (--json has them)")
    if best.compiled is None:
        lines.append("confirmed: no (the model alone)")
    else:
        lines.append(
            f"confirmed by the compiler: the model is off by {best.memory_error:+.1%} in memory "
            f"and {best.received_error:+.1%} in bytes received"
        )
    if stated_choice is not None and stated_choice is not best:
        differences = search.changed(stated_choice.run, best.run)
        if differences:
            settings = " ".join(f"{key}={value}" for key, value in differences.items())
            lines.append(f"the config as it is: {search.why(stated_choice, best)}; better: {settings}")
    return lines

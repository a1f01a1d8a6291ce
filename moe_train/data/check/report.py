"""Print the results of a check: each problem with its location, then a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_train.data.records.unread import in_words

_BAR = 40  # width of a bar in characters


def print_report(answer: dict[str, Any], console: Console) -> None:
    """Print the results that `check.check` returned."""
    for rule, count in answer["problem_counts"].items():
        problems = [problem for problem in answer["problems"] if problem["rule"] == rule]
        _print_named(console, rule, count, problems[0]["remedy"], [f"{p['where']}: {p['message']}" for p in problems])
    if (duplicates := answer["duplicates"]) and duplicates["examples"]:
        twins = [f"{twin['where']}: like {twin['like']} ({twin['similarity']:.0%})" for twin in duplicates["examples"]]
        remedy = "no fault; learnt as often as they stand there, so leave out what is not meant"
        _print_named(console, "duplicates", duplicates["exact"] + duplicates["near"], remedy, twins)
    if (overlap := answer["overlap"]) and overlap["examples"]:
        remedy = "no fault of theirs; what they share is not held out, so leave them out of one of the two"
        _print_named(console, "overlap with the evaluation set", overlap["records"], remedy, overlap["examples"])
    for change in (answer.get("fixed") or {}).get("changes", ()):
        line = f"would be {change['action']}: {change['where']}: {change['what']} ({change['rule']})"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(answer):
        table.add_row(name, escape(value))
    console.print(table)


def _print_named(console: Console, heading: str, count: int, remedy: str, lines: list[str]) -> None:
    """Print the heading of a group of findings, its members, and how many more there are."""
    console.print(f"[bold]{heading}[/bold]: {count:,} × — {escape(remedy)}")
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if count > len(lines):
        console.print(f"  … and {count - len(lines):,} more")
    console.print()


def _rows(answer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table."""
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in answer["shapes"].items())
    yield "files", f"{answer['files']:,} ({answer['bytes'] / 1e6:,.1f} MB)"
    if sample := answer.get("sample"):
        yield "sample", _sample(sample)
    yield "records", f"{answer['records']:,} ({shapes or 'none that can be read'})"
    if answer["not_read"]:
        yield "not read", in_words(answer["not_read"])
    yield "with problems", f"{answer['records_with_problems']:,}"
    if answer["examples"] != answer["records"]:
        yield "examples", f"{answer['examples']:,} (with tools as few as the tokens allow; none of a record with problems)"
    share = ""
    if answer["tokens"]:
        share = f" ({answer['loss_tokens'] / answer['tokens']:.1%})"
    yield "tokens", f"{answer['tokens']:,}"
    yield "… that bear loss", f"{answer['loss_tokens']:,}{share}"
    if merged := answer["merged_turns"]:
        yield "turns in one row", _merged_turns(merged)
    if lengths := answer["lengths"]:
        yield (
            "length",
            f"mean {lengths['mean']:,.0f}, median {lengths['median']:,}, 95% {lengths['p95']:,}, longest {lengths['max']:,}",
        )
        largest = max(entry["examples"] for entry in lengths["histogram"])
        for entry in lengths["histogram"]:
            bar = "█" * -(-entry["examples"] * _BAR // largest)
            yield f"  up to {entry['up_to']:,}", f"{entry['examples']:>9,} {bar}"
    if truncation := answer["truncation"]:
        longer = truncation["examples_longer"]
        beyond = truncation["tokens_beyond"]
        kept = ""
        if some := truncation["examples_with_fitting_turns"]:
            kept = f"; too_long: drop keeps the turns that fit of {some:,} with tools"
        yield f"longer than {truncation['seq_len']:,}", f"{longer:,} examples, {beyond:,} tokens beyond{kept}"
    else:
        yield "longer than", "unknown: state --seq-len"
    if packing := answer["packing"]:
        filled = ""
        if packing["efficiency"] is not None:
            filled = f", {packing['efficiency']:.1%} full"
        yield "packing", f"{packing['rows']:,} rows{filled}"
        steps = packing["steps_per_epoch"]
        if steps is None:
            yield "an epoch", "unknown: state --batch-size"
        else:
            yield "an epoch", f"{steps:,} steps of {packing['batch_size']:,} rows"
        if len(packing["sources"]) > 1:
            times = [f"{source['times_seen']:g} × {', '.join(source['files'])}" for source in packing["sources"]]
            yield "… sees", "; ".join(times)
        if (seconds := packing["seconds_per_epoch"]) is not None:
            yield "… takes", _duration(seconds)
    if duplicates := answer["duplicates"]:
        yield "duplicates", f"{duplicates['exact']:,} exact, {duplicates['near']:,} near ({duplicates['method']})"
    if overlap := answer["overlap"]:
        with_it = f"{overlap['records']:,} records share {overlap['words']} consecutive words with"
        yield "evaluation set", f"{with_it} {overlap['evaluation_records']:,} of its {overlap['of']:,}"
    if fixed := answer.get("fixed"):
        left = f", {fixed['left']:,} left as they are, which training accepts" if fixed["left"] else ""
        counts = f"{fixed['kept']:,} records kept ({fixed['changed']:,} of them changed{left}), {fixed['dropped']:,} dropped"
        if fixed["directory"] is None:
            yield "would be fixed", f"{counts}; nothing was written"
        else:
            yield "fixed", f"{fixed['directory']}: {counts}; changes.log there has each change"


def _merged_turns(merged: dict[str, Any]) -> str:
    """Describe what merging the turns of conversations with tools or reasoning saves, and where it was not possible."""
    separate = f"{merged['turns']:,}; as one example per turn: {merged['separate_tokens']:,} tokens"
    text = f"{separate}; merged: {merged['tokens']:,} tokens in {merged['examples']:,} examples"
    for reason, count in merged["restarts"].items():
        text += f"; {count:,} started anew because {reason}"
    return text


def _sample(sample: dict[str, Any]) -> str:
    """Describe the coverage of a sample."""
    total = "an unknown number"
    if sample["of_about"] is not None:
        total = f"about {sample['of_about']:,} ({sample['share']:.2%})"
    begun_files = ""
    if sample["only_begun"]:
        begun_files = f"; only the beginning of {len(sample['only_begun']):,} files that cannot be entered anywhere"
    return f"{sample['records']:,} of {total} records, from all over the files{begun_files}; what follows is of the sample alone"


def _duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    minutes = seconds / 60
    hours = seconds / 3600
    if hours >= 1:
        return f"{hours:,.1f} hours"
    if minutes >= 2:
        return f"{minutes:.0f} minutes"
    return f"{seconds:.0f} seconds"

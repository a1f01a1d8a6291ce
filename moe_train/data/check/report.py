"""Print the results of a check: each problem with its location, then a table."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_train.data.check.results import CheckResult, FixedResult, MergedTurnsResult, PackingResult, SampleResult
from moe_train.data.records.unread import in_words
from moe_train.machine.program import runnable

_BAR = 40  # width of a bar in characters


def print_report(result: CheckResult, console: Console) -> None:
    """Print the results that `check_data` returned."""
    for rule, count in result["problem_counts"].items():
        problems = [problem for problem in result["problems"] if problem["rule"] == rule]
        # At least one problem of each rule is listed (--show is 1 or more), and its remedy stands for all that have the same.
        remedy = problems[0]["remedy"]
        lines: list[str] = []
        for problem in problems:
            line = f"{problem['where']}: {problem['message']}"
            lines.append(line if problem["remedy"] == remedy else f"{line}; {runnable(problem['remedy'])}")
        _print_group(console, rule, count, remedy, lines)
    duplicates = result["duplicates"]
    if duplicates and duplicates["examples"]:
        twins = [f"{twin['where']}: like {twin['like']} ({twin['similarity']:.0%})" for twin in duplicates["examples"]]
        remedy = "no fault; training sees each copy, so remove those that are not intended"
        _print_group(console, "duplicates", duplicates["exact"] + duplicates["near"], remedy, twins)
    overlap = result["overlap"]
    if overlap and overlap["examples"]:
        remedy = "no fault of a record; what both sets contain is not held out, so remove it from one of them"
        _print_group(console, "overlap with the evaluation set", overlap["records"], remedy, overlap["examples"])
    fixed = result.get("fixed")
    for change in fixed.get("changes", ()) if fixed else ():
        line = f"would be {change['action']}: {change['where']}: {change['what']} ({change['rule']})"
        # Text of the records may look like markup, and must not be broken where it is to be searched for.
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(result):
        table.add_row(name, escape(value))
    console.print(table)


def _print_group(console: Console, heading: str, count: int, remedy: str, lines: list[str]) -> None:
    """Print the heading of a group of findings, its members, and how many more there are."""
    console.print(f"[bold]{heading}[/bold]: {count:,} × — {escape(runnable(remedy))}")
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if count > len(lines):
        console.print(f"  … and {count - len(lines):,} more")
    console.print()


def _rows(result: CheckResult) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table."""
    yield from _record_rows(result)
    yield from _length_rows(result)
    if result["packing"]:
        yield from _packing_rows(result["packing"])
    yield from _comparison_rows(result)
    fixed = result.get("fixed")
    if fixed:
        yield _fixed_row(fixed)


def _record_rows(result: CheckResult) -> Iterator[tuple[str, str]]:
    """Yield the rows on files, records and tokens."""
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in result["shapes"].items())
    yield "files", f"{result['files']:,} ({result['bytes'] / 1e6:,.1f} MB)"
    if result.get("left_out"):
        yield "files not read", in_words(result["left_out"], unit="file")
    if "personal_data" in result:
        counts = ", ".join(f"{count:,} {rule}" for rule, count in result["personal_data"].items())
        yield "personal data", counts or "none found"
    if result.get("without_licence"):
        sources = ", ".join(f"data.train.{index}" for index in result.get("without_licence", []))
        yield "no licence", f"{sources}: state licence and origin there, which exports and evidence repeat"
    sample = result.get("sample")
    if sample:
        yield "sample", _sample(sample)
    yield "records", f"{result['records']:,} ({shapes or 'none that can be read'})"
    if result["not_read"]:
        yield "not read", in_words(result["not_read"])
    yield "with problems", f"{result['records_with_problems']:,}"
    if result["examples"] != result["records"]:
        yield "examples", f"{result['examples']:,} (with tools as few as the tokens allow; none of a record with problems)"
    share = ""
    if result["tokens"]:
        share = f" ({result['loss_tokens'] / result['tokens']:.1%})"
    yield "tokens", f"{result['tokens']:,}"
    yield "… that bear loss", f"{result['loss_tokens']:,}{share}"
    pictures = result["pictures"]
    if pictures:
        each = f"of each: median {pictures['median_tokens']:,}, most {pictures['most_tokens']:,}"
        yield "pictures", f"{pictures['pictures']:,} ({pictures['tokens']:,} tokens; {each})"
    sound = result["sound"]
    if sound:
        each = f"of each: median {sound['median_tokens']:,}, most {sound['most_tokens']:,}"
        yield "clips of sound", f"{sound['clips']:,} ({sound['tokens']:,} tokens; {each})"
    if result["merged_turns"]:
        yield "turns in one row", _merged_turns(result["merged_turns"])


def _length_rows(result: CheckResult) -> Iterator[tuple[str, str]]:
    """Yield the rows on the lengths of examples, with a histogram, and on those that are too long."""
    lengths = result["lengths"]
    if lengths:
        quantiles = f"median {lengths['median']:,}, 95% {lengths['p95']:,}, longest {lengths['max']:,}"
        yield "length", f"mean {lengths['mean']:,.0f}, {quantiles}"
        largest = max(entry["examples"] for entry in lengths["histogram"])
        for entry in lengths["histogram"]:
            # Rounded up, so that a bin with an example has a bar.
            bar = "█" * -(-entry["examples"] * _BAR // largest)
            yield f"  up to {entry['up_to']:,}", f"{entry['examples']:>9,} {bar}"
    truncation = result["truncation"]
    if truncation is None:
        yield "longer than", "unknown: state --seq-len"
        return
    text = f"{truncation['examples_longer']:,} examples, {truncation['tokens_beyond']:,} tokens beyond"
    num_fitting = truncation["examples_with_fitting_turns"]
    if num_fitting:
        text += f"; too_long: drop keeps the turns that fit of {num_fitting:,} with tools"
    yield f"longer than {truncation['seq_len']:,}", text


def _packing_rows(packing: PackingResult) -> Iterator[tuple[str, str]]:
    """Yield the rows on packing and the length of an epoch."""
    filled = ""
    if packing["efficiency"] is not None:
        filled = f", {packing['efficiency']:.1%} full"
    yield "packing", f"{packing['rows']:,} rows{filled}"
    steps = packing["steps_per_epoch"]
    if steps is None:
        yield "an epoch", "unknown: state --batch-size"
    else:
        yield "an epoch", f"{steps:,} steps of {packing['batch_size']:,} rows"
    # A single source is always seen once.
    if len(packing["sources"]) > 1:
        times = [f"{source['times_seen']:g} × {', '.join(source['files'])}" for source in packing["sources"]]
        yield "… sees", "; ".join(times)
    if packing["seconds_per_epoch"] is not None:
        yield "… takes", _duration(packing["seconds_per_epoch"])


def _comparison_rows(result: CheckResult) -> Iterator[tuple[str, str]]:
    """Yield the rows on duplicates and on the overlap with the evaluation set."""
    duplicates = result["duplicates"]
    if duplicates:
        yield "duplicates", f"{duplicates['exact']:,} exact, {duplicates['near']:,} near ({duplicates['method']})"
    overlap = result["overlap"]
    if overlap:
        records = f"{overlap['records']:,} records share {overlap['words']} consecutive words with"
        yield "evaluation set", f"{records} {overlap['evaluation_records']:,} of its {overlap['of']:,}"


def _fixed_row(fixed: FixedResult) -> tuple[str, str]:
    """Return the row on the corrected copy."""
    unchanged = f", {fixed['left']:,} left as they are, which training accepts" if fixed["left"] else ""
    counts = f"{fixed['kept']:,} records kept ({fixed['changed']:,} of them changed{unchanged}), {fixed['dropped']:,} dropped"
    if fixed["directory"] is None:
        return "would be fixed", f"{counts}; nothing was written"
    return "fixed", f"{fixed['directory']}: {counts}; changes.log there has each change"


def _merged_turns(merged: MergedTurnsResult) -> str:
    """Describe what merging the turns of conversations with tools saves, and where it was not possible."""
    separate = f"{merged['turns']:,}; as one example per turn: {merged['separate_tokens']:,} tokens"
    text = f"{separate}; merged: {merged['tokens']:,} tokens in {merged['examples']:,} examples"
    for reason, count in merged["restarts"].items():
        text += f"; {count:,} started anew because {reason}"
    return text


def _sample(sample: SampleResult) -> str:
    """Describe the coverage of a sample."""
    total = "an unknown number"
    if sample["of_about"] is not None:
        total = f"about {sample['of_about']:,} ({sample['share']:.2%})"
    unfinished_files = ""
    if sample["only_begun"]:
        unfinished_files = f"; only the beginning of {len(sample['only_begun']):,} files that cannot be entered anywhere"
    return (
        f"{sample['records']:,} of {total} records, from all over the files{unfinished_files}; what follows is of the sample alone"
    )


def _duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    minutes = seconds / 60
    hours = seconds / 3600
    if hours >= 1:
        return f"{hours:,.1f} hours"
    if minutes >= 2:
        return f"{minutes:.0f} minutes"
    return f"{seconds:.0f} seconds"

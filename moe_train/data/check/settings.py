"""The settings of a check, and the names of the rules that it knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_train.data.check import personal_data, rules
from moe_train.data.check.findings import PersonalDataSearch
from moe_train.data.check.sources import CheckedSource
from moe_train.machine.files import refuse_existing

_RULES_OF_READING = {
    "arguments", "call-text", "columns", "effort", "no-template", "pair", "settings", "template", "text-and-call",
    "text-and-content", "thinking", "tool-schema", "tools", "type", "unread-key", "weight", "picture", "sound",
}  # fmt: skip
_RULES_OF_TRAINING = {"empty-text", "mixed-kinds", "no-loss", "refused", "stretch", "too-long"}
_RULES_OF_FILES = {"empty-file", "not-a-record", "not-json", "not-utf-8", "unreadable"}  # these concern no record

_RULES_OF_PERSONAL_DATA = {kind.rule for kind in personal_data.KINDS}

RULE_NAMES = (
    frozenset(rule.name for rule in rules.RULES)
    | _RULES_OF_PERSONAL_DATA
    | _RULES_OF_READING
    | _RULES_OF_TRAINING
    | _RULES_OF_FILES
)
"""The names of all rules, any of which `allowed` may name."""


@dataclass(frozen=True)
class CheckSettings:
    """The settings of a check."""

    template: str | None = None
    """The chat template; None if there is none."""
    reasoning_effort: str | None = None
    """The effort of conversations that are recognized by their columns and state none; None if they have none."""
    allowed: frozenset[str] = frozenset()
    """Rules that may be broken."""
    seq_len: int | None = None
    """Positions in a row of the training to come; None if unknown."""
    batch_size: int | None = None
    """Rows in a batch of the training to come; None if unknown."""
    against: tuple[CheckedSource, ...] = ()
    """The evaluation set to compare with."""
    bench: Path | None = None
    """The output of `bench --json`, for the speed of training; None if unknown."""
    fix: Path | None = None
    """The folder for a corrected copy; None to write none."""
    dry_run: bool = False
    """Whether to say what a corrected copy would change, without writing it."""
    sample: int | None = None
    """Number of records to read; None for all."""
    personal_data: PersonalDataSearch | None = None
    """How to search for personal data and secrets; None not to search."""
    num_proc: int = 1
    """Number of processes."""
    num_listed: int = 10
    """Number of problems, duplicates and changes to list for each rule."""

    @property
    def repairing(self) -> bool:
        """Whether records are corrected."""
        return self.fix is not None or self.dry_run

    def validate(self) -> None:
        """Check that the settings agree with one another and with the disk.

        Raises:
            ValueError: If a sample is to be fixed, a rule is unknown, or a library that finds personal data is missing.
            FileExistsError: If the `fix` folder exists.
        """
        if self.sample is not None and self.repairing:
            raise ValueError(f"a sample cannot be fixed: leave out --sample or {'--fix' if self.fix else '--dry-run'}")
        if self.fix is not None:
            refuse_existing(self.fix)
        if self.personal_data is not None:
            personal_data.require_libraries()
            personal_data.check_region(self.personal_data.phone_region)
        unknown = sorted(self.allowed - RULE_NAMES)
        if unknown:
            raise ValueError(f"there is no rule {unknown[0]}; the rules are {', '.join(sorted(RULE_NAMES))}")

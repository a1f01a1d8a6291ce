"""Find personal data and secrets in records, and replace them; what was found is located and counted, never shown.

E-mail addresses by pattern, phone numbers by phonenumbers, numbers with a checksum (bank accounts, cards, national ids) by
python-stdnum, secrets by detect-secrets, without its guesses by entropy. Names and addresses of people are not found. The
libraries come with the extra `pii`.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moe_train.data.records.problem import Problem
from moe_train.machine.files import Json


class Kind(NamedTuple):
    """A kind of personal data."""

    rule: str
    """Name of the rule that a record breaks."""
    title: str
    """What it is, for messages."""
    placeholder: str
    """What replaces it."""


SECRET = Kind("secret", "a secret, such as a key or a password", "[SECRET]")
EMAIL = Kind("pii-email", "an e-mail address", "[EMAIL]")
IBAN = Kind("pii-iban", "the number of a bank account", "[IBAN]")
CARD = Kind("pii-card", "the number of a payment card", "[CARD]")
NATIONAL_ID = Kind("pii-id", "a national identification number", "[ID]")
PHONE = Kind("pii-phone", "a phone number", "[PHONE]")
KINDS = (SECRET, EMAIL, IBAN, CARD, NATIONAL_ID, PHONE)
"""All kinds; where two overlap, the earlier one counts."""


class Detection(NamedTuple):
    """A place in a text."""

    kind: Kind
    start: int
    stop: int


Detector = Callable[[str], Iterator[Detection]]

_EMAIL = re.compile(r"[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}\b")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----.*?(?:-----END [A-Z ]*PRIVATE KEY( BLOCK)?-----|\Z)", re.S)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
_CARD = re.compile(r"(?<![\d.-])[2-6](?:[ -]?\d){12,18}(?![\d.-]*\d)")
_GUESSES = ("Base64HighEntropyString", "HexHighEntropyString", "IPPublicDetector")
"""Detectors of detect-secrets that flag ordinary text of programs."""
_IDS = (
    (re.compile(r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)"), "us.ssn"),
    (re.compile(r"(?<!\w)[12] ?\d{2} ?\d{2} ?\w{2} ?\d{3} ?\d{3} ?\d{2}(?!\w)"), "fr.nir"),
    (re.compile(r"(?<!\w)\d{8}-?[A-Z](?!\w)"), "es.dni"),
    (re.compile(r"(?<!\w)[XYZ]-?\d{7}-?[A-Z](?!\w)"), "es.nie"),
    (re.compile(r"(?<!\w)[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z](?!\w)"), "it.codicefiscale"),
    (re.compile(r"(?<!\d)\d{2}[.]\d{2}[.]\d{2}[- ]\d{3}[.]\d{2}(?!\d)"), "be.nn"),
    (re.compile(r"(?<![\d.-])\d{11}(?![\d.-]*\d)"), "pl.pesel"),
)
"""(pattern, module of stdnum); only numbers whose checksum or form leaves little to chance."""


def require_libraries() -> None:
    """Raise ValueError, which names the extra, if a library is missing."""
    try:
        import detect_secrets  # noqa: F401
        import phonenumbers  # noqa: F401
        import stdnum  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--pii needs the extra pii ({error.name} is not installed): bash launch/install.sh pii") from error


def check_region(region: str | None) -> None:
    """Raise ValueError if a country for phone numbers is not known."""
    import phonenumbers

    if region is not None and region not in phonenumbers.SUPPORTED_REGIONS:
        raise ValueError(f"--phone-region {region} is no country; state two letters, such as DE")


def detect(text: str, region: str | None) -> list[Detection]:
    """Return what a text has, in the order of places, without overlaps.

    Args:
        text: The text.
        region: Country whose phone numbers may stand without +, such as DE; None for international numbers alone.
    """
    chosen: list[Detection] = []
    for detector in _detectors(region):
        for found in detector(text):
            if all(found.stop <= other.start or other.stop <= found.start for other in chosen):
                chosen.append(found)
    return sorted(chosen, key=lambda detection: detection.start)


@functools.cache
def _detectors(region: str | None) -> tuple[Detector, ...]:
    """Return the detectors in the order of `KINDS`."""
    return (_secrets, _emails, _ibans, _cards, _ids, functools.partial(_phones, region=region))


def _emails(text: str) -> Iterator[Detection]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Detection(EMAIL, *match.span())


def _ibans(text: str) -> Iterator[Detection]:
    from stdnum import iban

    for match in _IBAN.finditer(text):
        # The pattern may go on into the next word, so the longest beginning with a right checksum counts.
        for stop in range(match.end(), match.start() + 14, -1):
            if not text[stop - 1].isspace() and iban.is_valid(text[match.start() : stop]):
                yield Detection(IBAN, match.start(), stop)
                break


def _cards(text: str) -> Iterator[Detection]:
    from stdnum import luhn

    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        # A run of one digit passes the checksum, and is a pattern rather than a number.
        if len(digits) <= 19 and len(set(digits)) > 1 and luhn.is_valid(digits):
            yield Detection(CARD, *match.span())


def _ids(text: str) -> Iterator[Detection]:
    for pattern, name in _IDS:
        for match in pattern.finditer(text):
            if importlib.import_module(f"stdnum.{name}").is_valid(match[0]):
                yield Detection(NATIONAL_ID, *match.span())


def _phones(text: str, region: str | None) -> Iterator[Detection]:
    import phonenumbers

    if region is None and "+" not in text:
        return
    for match in phonenumbers.PhoneNumberMatcher(text, region):
        yield Detection(PHONE, match.start, match.end)


def _secrets(text: str) -> Iterator[Detection]:
    for match in _PRIVATE_KEY.finditer(text):
        yield Detection(SECRET, *match.span())
    for pattern in _secret_patterns():
        for match in pattern.finditer(text):
            yield Detection(SECRET, *match.span())
    start = 0
    for line in text.splitlines(keepends=True):
        for secret in _assigned_secrets(line):
            place = line.find(secret)
            if place >= 0:
                yield Detection(SECRET, start + place, start + place + len(secret))
        start += len(line)


@functools.cache
def _secret_patterns() -> tuple[re.Pattern[str], ...]:
    """Return the patterns of detect-secrets, whose matches hold the whole secret, while its results may hold a part."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    patterns: list[re.Pattern[str]] = []
    detectors: dict[str, Any] = get_mapping_from_secret_type_to_class()
    for detector in detectors.values():
        if detector.__name__ not in (*_GUESSES, "KeywordDetector", "PrivateKeyDetector"):
            patterns += detector().denylist
    return tuple(patterns)


def _assigned_secrets(line: str) -> Iterator[str]:
    """Yield what a line assigns to a name such as `password` or `api_key`."""
    from detect_secrets.plugins.keyword import KeywordDetector

    yield from (str(secret) for secret in KeywordDetector().analyze_string(line) if len(secret) > 3)


class ScannedRecord(NamedTuple):
    """A record without its personal data, and what was replaced."""

    fields: Json
    problems: list[Problem]
    """One for each place."""
    changes: list[tuple[str, str]]
    """(rule, what was changed) for each place."""


def scan_record(fields: Json, region: str | None, allowed: frozenset[str]) -> ScannedRecord:
    """Search every text and number of a record.

    Args:
        fields: All columns of the record, also those that are not trained on.
        region: See `detect`.
        allowed: Rules that may be broken, and are not corrected.
    """
    result = ScannedRecord(None, [], [])
    redacted = _redact(fields, "", region, allowed, result)
    return result._replace(fields=redacted)


def _redact(value: Json, path: str, region: str | None, allowed: frozenset[str], result: ScannedRecord) -> Json:
    """Return a value without personal data, and note in `result` what was replaced."""
    if isinstance(value, dict):
        return {key: _redact(inner, f"{path}.{key}".lstrip("."), region, allowed, result) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(inner, f"{path}.{i}".lstrip("."), region, allowed, result) for i, inner in enumerate(value)]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, str) and not is_number:
        return value
    text = str(value)
    pieces = []
    end = 0
    for kind, start, stop in detect(text, region):
        if kind.rule in allowed:
            continue
        remedy = f"remove it, or let --fix write {kind.placeholder} in its place"
        result.problems.append(Problem(kind.rule, f"{path} has {kind.title} at characters {start} to {stop}", remedy))
        result.changes.append((kind.rule, f"{path}: {kind.title} replaced by {kind.placeholder}"))
        pieces += [text[end:start], kind.placeholder]
        end = stop
    return "".join([*pieces, text[end:]]) if pieces else value

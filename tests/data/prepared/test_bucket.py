"""What a bucket's file system raises becomes one line with a remedy."""

from __future__ import annotations

import pytest

from moe_train.data.prepared.bucket import fault, open_files


class HttpResponseError(Exception):
    """As Azure's library names and fills its own."""

    status_code = 403


class NoCredentialsError(Exception):
    """As Amazon's library names its own."""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError("x"), FileNotFoundError, "is missing; is the bucket's name right, and was all of it copied there?"),
        (PermissionError("Forbidden"), PermissionError, "is refused: Forbidden; state credentials with the right to it, "),
        (HttpResponseError("Server failed"), PermissionError, "is refused: Server failed; state credentials"),
        (NoCredentialsError("Unable\nto locate"), PermissionError, "is refused: Unable to locate; state credentials"),
        (TimeoutError(), OSError, "cannot be reached: no answer within 60 s; start again when the store answers"),
        (OSError("x" * 500), OSError, f"cannot be reached: {'x' * 160}…; start again"),
    ],
)
def test_an_error_of_the_store_becomes_one_line(error: Exception, kind: type[OSError], message: str) -> None:
    found = fault("gs://bucket/tokens", error)
    assert type(found) is kind and str(found).startswith(f"gs://bucket/tokens {message}")


def test_a_url_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^nosuch://bucket cannot be opened: .*nosuch"):
        open_files("nosuch://bucket")

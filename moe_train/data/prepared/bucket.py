"""Open the file system of a bucket by its URL (any that fsspec supports: gs://, s3://, …), and explain its errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.machine.network import require_network

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PATIENCE = 60
"""Seconds to wait for an answer of the store."""


def open_files(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL (or path), and the path in it.

    Raises:
        ValueError: If the URL is malformed, the package for its store is not installed, or the network is forbidden.
        PermissionError: If access is refused.
        OSError: If the store cannot be reached.
    """
    if "://" in url and not url.startswith(("file://", "memory://")):
        require_network(url)
    # Imported here, since most runs read no bucket.
    import fsspec

    try:
        # ImportError names the package that the scheme needs, such as gcsfs; ValueError is an unknown scheme.
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {reason(error)}") from error
    except Exception as error:  # each file system has its own exceptions
        raise fault(url, error) from error


def fault(path: str, error: Exception) -> OSError:
    """Return the exception to raise, with a message in one line, after a bucket's file system raised `error`."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{path} is missing; is the bucket's name right, and was all of it copied there?")
    # Azure's errors have a `status_code`, Google's a `code`; botocore raises NoCredentialsError and the like without either.
    status = getattr(error, "status_code", getattr(error, "code", None))
    if isinstance(error, PermissionError) or str(status) in ("401", "403") or "Credential" in type(error).__name__:
        remedy = "state credentials with the right to it, as the store's own tools read them (variables of the environment, login)"
        return PermissionError(f"{path} is refused: {reason(error)}; {remedy}")
    return OSError(f"{path} cannot be reached: {reason(error)}; start again when the store answers")


def reason(error: Exception) -> str:
    """Return the message of an error in one line, without the documents that stores append."""
    if isinstance(error, TimeoutError):
        return f"no answer within {PATIENCE} s"
    message = " ".join(str(error).split())
    if len(message) > 160:
        return f"{message[:160]}…"
    return message or type(error).__name__

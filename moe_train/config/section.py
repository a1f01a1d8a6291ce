"""The base class of all config sections (strict, immutable, no unknown keys), and the value types that several sections share."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _integral(value: object) -> object:
    """Convert a float without a fraction to an integer, since YAML reads `1e9` as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_tuple(value: object) -> object:
    """Convert a list to a tuple: strict types accept a list only in JSON, and not after a validator of the whole section."""
    return tuple(value) if isinstance(value, list) else value


def _path(value: str) -> str:
    """Reject a URL, which would otherwise become a local folder of that name."""
    if "://" in value:
        raise ValueError(
            "this is a URL, but a path is needed; state a path on this machine, or on a file system that all hosts share "
            "(NFS, Lustre, a mounted bucket). Only prepared data are read from buckets: {name: prepared, path: …}"
        )
    return value


LocalPath = Annotated[str, AfterValidator(_path)]
"""A path in the local file system, or in one that all hosts share; not a URL."""


def _run_dir(value: str) -> str:
    """Reject a URL of the web, and one without a bucket or without a folder in it."""
    if "://" in value and not re.fullmatch(r"(?!https?:)[a-z0-9]+://[^/\s]+/\S+|(file|local):///\S+", value):
        raise ValueError(
            "this URL does not name a folder in a bucket; state one such as gs://BUCKET/runs/NAME or s3://BUCKET/runs/NAME"
        )
    return value


RunDirectory = Annotated[str, AfterValidator(_run_dir)]
"""A path, or the URL of a folder in a bucket, in which a run keeps its checkpoints and records."""


Positive = Annotated[int, Field(ge=1), BeforeValidator(_integral)]
"""An integer of at least 1."""


NonNegative = Annotated[int, Field(ge=0), BeforeValidator(_integral)]
"""An integer of at least 0."""


Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_integral)]
"""A random seed, which JAX reads as a signed 64-bit integer."""


PositiveFloat = Annotated[float, Field(gt=0)]
"""A number greater than 0."""


NonNegativeFloat = Annotated[float, Field(ge=0)]
"""A number of at least 0."""


Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1, both included."""


Decay = Annotated[float, Field(ge=0, lt=1)]
"""A number from 0 to below 1."""


Dtype = Literal["float32", "bfloat16"]
"""A floating-point dtype."""


class Section(BaseModel):
    """The base class of all config sections: strict types, no unknown keys, immutable."""

    # Strict: a quoted "10" or a 1 for true is an error rather than a guess. Frozen: defaults are shared.
    # The docstring below a field describes it in the schema, the reference and `moe-train explain`.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

"""What every section is made of: strict, immutable, without unknown keys; and the types that several share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _integral(value: object) -> object:
    """`1e9` is a float to YAML; where a whole number is asked for, a float without a fraction is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(value: str) -> str:
    """A URL would become a folder of that name."""
    if "://" in value:
        raise ValueError(
            "a URL where a path is needed; name a path of this machine, or of a file system (NFS, Lustre, a mounted bucket) "
            "that all hosts share. Only prepared data are read from buckets: {name: prepared, path: …}"
        )
    return value


LocalPath = Annotated[str, AfterValidator(_path)]


Positive = Annotated[int, Field(ge=1), BeforeValidator(_integral)]


NonNegative = Annotated[int, Field(ge=0), BeforeValidator(_integral)]


PositiveFloat = Annotated[float, Field(gt=0)]


NonNegativeFloat = Annotated[float, Field(ge=0)]


Fraction = Annotated[float, Field(ge=0, le=1)]


Decay = Annotated[float, Field(ge=0, lt=1)]


Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

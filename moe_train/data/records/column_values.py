"""Convert the values of Arrow columns to JSON values, so that a table gives the same records as JSON lines.

- A null in a struct is left out, at every depth: a struct has all its members in every row, and a member that a record did not
  have is filled in as null. Nulls in lists, maps and JSON columns are kept, since only the writer of the record can put them there.
- A value of a JSON column (the extension type `arrow.json`, which Parquet's logical type JSON is read as) is parsed.
- Dates and times become ISO 8601 text, decimals become numbers, and maps become objects.
- A picture or a clip of sound as `datasets` stores it, {bytes, path}, becomes a data URL or a path; so do bytes in a column or a
  member that is named after pictures or sound.
- A value without a form in JSON (bytes, NaN, a duration) becomes a Problem, which counts only if something reads its column.
"""

from __future__ import annotations

import base64
import decimal
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from moe_train.data.records.json_parser import parse_strictly
from moe_train.data.records.media_parts import COLUMNS
from moe_train.data.records.problem import Problem, brief

Convert = Callable[[Any], Any]
"""A function that converts a value other than None, as pyarrow returns it, to a JSON value; it raises Problem if there is none."""

UNREADABLE_VALUE = (ValueError, ArithmeticError, LookupError, pa.ArrowException)
"""What pyarrow raises for a value that Python cannot represent, such as a year beyond 9999 or an unknown time zone."""


def rows(table: Any) -> list[dict[str, Any]]:
    """Return the rows of a record batch or table as records.

    A null column keeps its key. A value that has no form in JSON is replaced by the Problem with it; see `problem.usable`.
    """
    names = table.schema.names
    columns = [_column(table.column(i), table.schema.field(i)) for i in range(len(names))]
    # zip of no columns gives no rows, and rows without columns still count.
    if not columns:
        return [{} for _ in range(table.num_rows)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _column(column: Any, field: pa.Field) -> list[Any]:
    """Convert the values of a column."""
    convert = _named_converter(field)
    try:
        values = column.to_pylist()
        if convert is None:
            return values
        return [None if value is None else convert(value) for value in values]
    except UNREADABLE_VALUE:  # some value is at fault: convert each on its own
        return [_value(scalar, convert, field.name) for scalar in column]


def _value(scalar: Any, convert: Convert | None, column: str) -> Any:
    """Convert one value of a column; return the Problem if it has no form in JSON."""
    try:
        value = scalar.as_py()
        return value if value is None or convert is None else convert(value)
    except Problem as problem:
        return Problem(problem.rule, f"column {column!r} {problem.message}", problem.remedy)
    except UNREADABLE_VALUE as error:
        reason = " ".join(str(error).split())
        return Problem("type", f"column {column!r} holds a value that cannot be represented ({reason})", _CAST)


_CAST = "cast the column to text or numbers"


def _no_json(value: object) -> Problem:
    """Return the problem for a value that has no form in JSON."""
    return Problem("type", f"holds {brief(value)}, for which JSON has no value", _CAST)


def _converter(kind: pa.DataType) -> Convert | None:
    """Return the conversion for a type; None if pyarrow returns JSON values already."""
    if isinstance(kind, pa.BaseExtensionType):
        return _extension(kind)
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if types.is_struct(kind):
        return _struct(kind)
    if types.is_map(kind):
        return _map(kind)
    if types.is_nested(kind) and hasattr(kind, "value_type"):
        return _list(_converter(kind.value_type))
    if types.is_floating(kind):
        return _number
    if types.is_decimal(kind):
        return _decimal
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
        return _iso_text
    if _is_json_type(kind):
        return None
    return _refuse


def _named_converter(field: pa.Field) -> Convert | None:
    """Return the conversion for a column or a member of a struct, which may be files of pictures or sound."""
    kind = field.type
    if field.name in COLUMNS:
        if _is_bytes(kind):
            return _file_content
        if (types.is_list(kind) or types.is_large_list(kind)) and _is_bytes(kind.value_type):
            return _list(_file_content)
    return _converter(kind)


def _is_json_type(kind: pa.DataType) -> bool:
    """Return whether all values of a type are JSON values."""
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_text or types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind)


def _extension(kind: pa.BaseExtensionType) -> Convert | None:
    """Return the conversion for an extension type: JSON is parsed, an UUID is text, others are what they are stored as."""
    if kind.extension_name == "arrow.json":
        return _json
    if kind.extension_name == "arrow.uuid":
        return str
    # bool8 is stored as int8, which would otherwise read as a number.
    if kind.extension_name == "arrow.bool8":
        return bool
    return _converter(kind.storage_type)


def _json(text: str) -> Any:
    """Parse a value of a JSON column."""
    try:
        return parse_strictly(text)
    except ValueError as error:
        raise Problem("not-json", f"holds {brief(text)}, which is not JSON: {error}", "write each value as JSON") from error


def _struct(kind: pa.DataType) -> Convert:
    """Return the conversion for a struct: members that are null are left out."""
    if _is_picture(kind):
        return _picture
    converters = {kind.field(i).name: _named_converter(kind.field(i)) for i in range(kind.num_fields)}
    if not any(converters.values()):
        return _without_nulls

    def convert(value: dict[str, Any]) -> dict[str, Any]:
        """Convert a struct."""
        members = {}
        for name, member in value.items():
            if member is not None:
                convert_member = converters[name]
                members[name] = member if convert_member is None else convert_member(member)
        return members

    return convert


def _is_picture(kind: pa.DataType) -> bool:
    """Return whether a type is that of a picture as `datasets` stores it: the content of a file, or its path."""
    members = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return members.keys() == {"bytes", "path"} and _is_bytes(members["bytes"])


def _is_bytes(kind: pa.DataType) -> bool:
    """Return whether the values of a type are bytes."""
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _picture(value: dict[str, Any]) -> dict[str, Any]:
    """Convert a picture: its content becomes a data URL."""
    return _without_nulls(value) if value["bytes"] is None else _file_content(value["bytes"])


def _file_content(content: bytes) -> dict[str, Any]:
    """Convert the content of a file to a data URL; what kind of file it is, its own first bytes say."""
    return {"bytes": f"data:image;base64,{base64.b64encode(content).decode()}"}


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Convert a struct of which only nulls need a conversion."""
    return {name: member for name, member in value.items() if member is not None}


def _list(convert_element: Convert | None) -> Convert | None:
    """Return the conversion for a list, given that of its elements."""
    if convert_element is None:
        return None

    def convert(value: Sequence[Any]) -> list[Any]:
        """Convert a list."""
        return [None if element is None else convert_element(element) for element in value]

    return convert


def _map(kind: pa.DataType) -> Convert:
    """Return the conversion for a map, whose keys have to be text, to an object."""
    convert_item = _converter(kind.item_type)

    def convert(value: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
        """Convert a map."""
        members: dict[str, Any] = {}
        for key, item in value:
            if not isinstance(key, str) or key in members:
                raise Problem("type", f"holds a map with the key {brief(key)}, which JSON does not allow", _CAST)
            members[key] = item if item is None or convert_item is None else convert_item(item)
        return members

    return convert


def _number(value: Any) -> float:
    """Convert a floating-point number."""
    number = float(value)
    if not math.isfinite(number):
        raise _no_json(number)
    return number


def _decimal(value: decimal.Decimal) -> int | float:
    """Convert a decimal to a number with the same digits."""
    # An integer stays one whatever its size: JSON and Python have no limit there, and a float would round it above 2^53.
    if value == value.to_integral_value():
        return int(value)
    number = float(value)
    # repr gives the shortest digits that mean this float, which are those that JSON text of it would have.
    if decimal.Decimal(repr(number)) != value:
        raise Problem("type", f"holds the decimal {value}, which has more digits than a number", "cast the column to text")
    return number


def _iso_text(value: Any) -> str:
    """Convert a date or time."""
    return value.isoformat()


def _refuse(value: object) -> Any:
    """Refuse a value of a type that JSON does not have."""
    raise _no_json(value)

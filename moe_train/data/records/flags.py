"""Flags that say whether the loss covers a message or a part of it: every trainer's spelling of `weight`."""

from __future__ import annotations

from typing import Any

from moe_train.data.records.problem import Problem, brief

# Mistral's and OpenAI's weight, axolotl's train and training, ms-swift's loss, LLaMA-Factory's loss_weight
_FLAGS = ("weight", "train", "training", "loss", "loss_weight")
# Also as text, which is all that CSV holds, and as floats, which some tables hold in place of integers.
_VALUES = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
_NOT_THE_ASSISTANT = {"system", "user", "tool", "human", "observation", "developer", "function"}


def take_flag(remaining: dict[str, Any], location: str, role: object) -> int | None:
    """Take the flags out of a message or a part of it.

    Args:
        remaining: The keys that have not been read yet.
        location: What the object is, for a message.
        role: The role of the message.

    Returns:
        1 if the loss covers it, 0 if not; None if it does not say, or if it is not the assistant's.

    Raises:
        Problem: If flags contradict each other, a value is neither 0 nor 1, or the loss is to cover what is not the assistant's.
    """
    flag: int | None = None
    first = ""
    for name in _FLAGS:
        if name not in remaining:
            continue
        value = remaining.pop(name)
        meant = _VALUES.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
        if meant is None:
            raise Problem("weight", f"{location} has {name} {brief(value)}", "a weight is 0 (no loss) or 1")
        if flag is not None and meant != flag:
            raise Problem("weight", f"{location} has both {first} and {name}, which contradict each other", "keep one of them")
        # A weight on another role has no effect; the other names ask for a loss there, which must not be dropped silently.
        if meant and name != "weight" and isinstance(role, str) and role in _NOT_THE_ASSISTANT:
            message = f"{location} is {role}, and {name} asks for a loss on it, which only the assistant's messages bear"
            raise Problem("weight", message, "set it to 0, or drop the record")
        flag = meant
        first = name
    return None if isinstance(role, str) and role in _NOT_THE_ASSISTANT else flag


def common_flag(location: str, whole: int | None, parts: list[int | None]) -> int | None:
    """Return the flag of a message whose parts have flags of their own.

    Args:
        location: What the message is, for a message.
        whole: The flag of the message itself; None if it has none.
        parts: The flag of each part; None for a part without one.

    Raises:
        Problem: If the loss covers only some of the parts.
    """
    if all(flag is None for flag in parts):
        return whole
    # A part without a flag is trained on unless its message says otherwise, as a message without a flag is.
    default = 1 if whole is None else whole
    flags = {default if flag is None else flag for flag in parts}
    if len(flags) > 1:
        message = f"the loss covers some parts of {location} and others not"
        raise Problem("weight", message, "give all of its parts the same flag: a message is trained on as a whole or not at all")
    (flag,) = flags
    if whole is not None and flag != whole:
        raise Problem("weight", f"the flags of {location} and of its parts contradict each other", "keep one of them")
    return flag

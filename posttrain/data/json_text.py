"""JSON text, strictly: what Python's decoder lets through and a data set should not hold is an error here.

Refused: duplicate keys, NaN and Infinity, numbers beyond range, nesting too deep. `show` renders a value for an error message.
"""

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 64


class BadJSON(ValueError):
    """Text that is not JSON as we take it. `str()` is one line; `offset` counts characters, None where it is unknown."""

    def __init__(self, problem: str, offset: int | None = None) -> None:
        super().__init__(problem)
        self.offset = offset


def parse(text: str) -> Any:
    """The value that `text` holds. Raises `BadJSON`."""
    value, end = parse_at(text, skip_space(text, 0))
    if skip_space(text, end) != len(text):
        raise BadJSON("there is more text after the value", skip_space(text, end))
    return value


def parse_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at the character `start`, and where it ends. Raises `BadJSON`."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise BadJSON(error.msg[0].lower() + error.msg[1:], error.pos) from None
    except RecursionError:
        raise BadJSON("nested too deep", start) from None
    except BadJSON as error:
        error.offset = start
        raise
    except ValueError:  # the decoder's own limit on the digits of an integer
        raise BadJSON("a number has too many digits", start) from None


def skip_space(text: str, start: int) -> int:
    """Where the JSON white space that begins at `start` ends."""
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def problem_with(value: object, depth: int = 0) -> str | None:
    """Why `value` is not plain JSON that can be written back as UTF-8, or None. Columns of a Parquet file may hold anything."""
    if depth > MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH} levels"
    if isinstance(value, str):
        return surrogate_in(value)
    if value is None or isinstance(value, (bool, int)):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"holds {value}, which JSON has not"
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value):
            return "has a key that is not text"
        return next((p for pair in value.items() for part in pair if (p := problem_with(part, depth + 1))), None)
    if isinstance(value, list):
        return next((p for item in value if (p := problem_with(item, depth + 1))), None)
    return f"holds a {type(value).__name__}, which JSON has not"


def surrogate_in(text: str) -> str | None:
    """Why `text` cannot be written as UTF-8, or None: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start}; remove or repair it"
    return None


def show(value: object) -> str:
    """`value` for an error message: on one line, short, and never failing."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else repr(value[:57]) + "..."
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with {names(value)}" if value else "an empty object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 200):
        return repr(value)
    return f"a value of type {type(value).__name__}"


def names(keys: Any) -> str:
    """Up to twelve keys for an error message, on one line."""
    shown = [key if isinstance(key, str) and key.isprintable() and len(key) <= 40 else show(key) for key in keys]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise BadJSON(f"the key {show(twice)} stands twice in one object")
    return built


def _constant(name: str) -> NoReturn:
    raise BadJSON(f"{name} is not JSON; write null or a number")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise BadJSON(f"{show(digits)} is beyond the range of a number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)

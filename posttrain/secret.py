"""Secrets: what reads like a credential, so that none gets into what a run leaves on disk.

A pipeline file holds none: all of it is recorded. Credentials come from the environment, of which nothing is.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

MASK = "***"
NAME = re.compile(
    r"(?:^|_)(?:api_?key|access_?key|secret(?:_key)?|private_?key|password|passwd|credentials?|(?:hub|access|auth|api|hf)_?token)$|^token$",
    re.IGNORECASE,
)
"""Names of fields that hold a credential; `eos_token` and `max_tokens` are other things."""
VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
"""Names of environment variables that hold one."""
VALUE = (
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-(?:[a-z0-9]+-)*[A-Za-z0-9_]{16,}|\b(?:gh[opsu]|github_pat|glpat)[_-][A-Za-z0-9_]{16,}|\bAKIA[A-Z0-9]{16}\b"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s@]*:[^/\s@]+@"
)
"""Credentials that are known by their form: of the Hub, of model interfaces and code hosts, and in an address."""
SHORTEST = 8
"""Characters of a variable's value below which it may stand anywhere by chance."""


def find_secrets(value: Any) -> Iterator[str]:
    """The dotted paths of all that reads like a credential in a plain value."""
    forms = _forms()
    left: list[tuple[str, str, Any]] = [("", "", value)]
    while left:
        place, name, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{place}.{key}" if place else str(key), str(key), entry) for key, entry in reversed(value.items())]
        elif isinstance(value, list):
            left += [(f"{place}.{number}", "", entry) for number, entry in reversed([*enumerate(value)])]
        elif isinstance(value, str) and value and (NAME.search(name) or forms.search(value)):
            yield place


def mask_argument(argument: str) -> str:
    """A word of a command line as it may be recorded: of `name=value`, the name alone where one of the two reads like a credential."""
    name, equals, _ = argument.partition("=")
    if _forms().search(name):
        return MASK
    field = name.rpartition(".")[2].lstrip("-").replace("-", "_")
    return f"{name}={MASK}" if equals and (NAME.search(field) or _forms().search(argument)) else argument


def _forms() -> re.Pattern[str]:
    """What finds a credential in a text: by its form, or as the value of an environment variable that holds one by its name."""
    held = [value for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= SHORTEST]
    return re.compile("|".join([VALUE, *map(re.escape, sorted(held))]))

"""Tasks of lm-evaluation-harness as a config names them: what is wrong with a name or a file, told without importing the library.

To read all its tasks takes the library ten seconds, so a name is looked for in their files: none is known that stands in no file.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from posttrain.config import FILE_ENDINGS, nearest
from posttrain.error import UserError


def check_tasks(tasks: Sequence[str], at: str) -> None:
    """Raise `UserError`, naming the place under the config path `at`, where the library is missing, or a task is unknown or no task."""
    library = find_spec("lm_eval")
    if library is None or library.origin is None:
        raise UserError(f'{at}: lm-evaluation-harness is not installed; run: pip install "posttrain[lm-eval]"')
    for number, task in enumerate(tasks):
        if task in tasks[:number]:
            raise UserError(f"{at}.{number}: {task!r} stands twice; name it once")
        if is_file(task):
            read_fields(task, f"{at}.{number}")
        else:
            _check_name(task, Path(library.origin).parent / "tasks", f"{at}.{number}")


def is_file(task: str) -> bool:
    """Whether a task is named by its file."""
    return task.endswith(FILE_ENDINGS)


def read_fields(path: str, at: str) -> dict[str, str | None]:
    """The fields of a file that defines a task or a group of them, as they are written; None of what is no scalar. Raises `UserError`."""
    import yaml

    try:
        # Its values may be Python functions, which only the library reads.
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{at}: {path} cannot be read ({reason}); give the name of a task, or the path of its file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{at}: {path}{f', line {mark.line + 1}' if mark else ''}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{at}: {path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    fields = {str(key.value): value.value if isinstance(value, yaml.ScalarNode) else None for key, value in pairs}
    if not fields.keys() & {"task", "group", "include"}:
        raise UserError(f"{at}: {path} defines neither a task nor a group; name it there, as `task: my_task`")
    return fields


def _check_name(name: str, directory: Path, at: str) -> None:
    word = re.compile(rb"(?<![\w.-])" + re.escape(name).encode() + rb"(?![\w-])")
    # Mostly it is the first: that of the task, or one of its directory.
    files = sorted(directory.rglob("*.yaml"), key=lambda path: (path.stem != name, not name.startswith(path.parent.name)))
    if not name.strip() or not any(word.search(path.read_bytes()) for path in files):
        hint = nearest(name, [path.stem for path in files]) if name.strip() else "give a name"
        raise UserError(f"{at}: lm-evaluation-harness has no task {name!r}; {hint if hint.startswith('did') else 'see: lm_eval ls tasks'}")

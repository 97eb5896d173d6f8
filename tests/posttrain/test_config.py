"""From a pipeline file to checked, frozen objects: what is read as what, and which words a mistake is answered with."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from posttrain.config import (
    INPUT_FILE,
    Config,
    DataSource,
    ModelSource,
    apply_override,
    fields_help,
    identity,
    is_hub_id,
    load_yaml,
    nearest,
    read_pipeline,
    read_yaml,
    validate,
)
from posttrain.error import UserError

REPOSITORY = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Inner(Config):
    """A config in a config."""

    rank: int = Field(8, ge=1)
    """Rank."""
    names: str | list[str] = "all"
    """Names."""


class Speed(Config):
    """What does not bear identity."""

    bears_identity: ClassVar[bool] = False
    workers: int = 1
    """Workers."""


class Recipe(Speed):
    """What does."""

    bears_identity: ClassVar[bool] = True
    rate: float = Field(1e-3, gt=0)
    """Rate."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    inner: Inner | None = None
    """Inner."""
    template: Annotated[str | None, INPUT_FILE] = None
    """Template."""
    extra: dict[str, Any] = {}
    """Extra."""


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5), ("1e4", 1e4), ("5.", 5.0), ("0o17", 15), ("017", 17), ("0x1F", 31), ("-7", -7), ("+1", 1),
        ("no", "no"), ("on", "on"), ("true", True), ("~", None), ("", None), ("null", None), ("1:30", "1:30"),
        ("2026-10-01", "2026-10-01"), ("2026-10-01 12:00:00", "2026-10-01 12:00:00"), ("'5'", "5"),
        ("[1, a, {b: null}]", [1, "a", {"b": None}]),
        ("|\n two\n lines\n", "two\nlines\n"), ("日本", "日本"), ('"\\u65e5"', "日"), ("\ufeffa: 1", {"a": 1}),
    ],
)  # fmt: skip
def test_yaml_is_read_by_the_rules_of_1_2(text: str, value: object) -> None:
    read = load_yaml(text)
    assert read == value
    assert type(read) is type(value)


def test_json_is_yaml(tmp_path: Path) -> None:
    value = {"run": "x", "number": 1e-07, "text": 'a\u2028"b\\', "list": [True, None, -1.5]}
    (tmp_path / "x.yaml").write_text(json.dumps(value))
    assert read_yaml(tmp_path / "x.yaml") == value


def test_an_override_changes_only_the_place_it_names_not_what_an_alias_shares_with_it(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &shared {seed: 1, deep: {x: 1}}\nb: *shared\nc: {<<: *shared, rate: 2}\n")
    raw = read_yaml(tmp_path / "x.yaml")
    apply_override(raw, "a.seed=5")
    apply_override(raw, "a.deep.x=5")
    assert raw == {"a": {"seed": 5, "deep": {"x": 5}}, "b": {"seed": 1, "deep": {"x": 1}}, "c": {"seed": 1, "deep": {"x": 1}, "rate": 2}}


@pytest.mark.parametrize(
    ("override", "after"),
    [
        ("a=5", {"a": 5}),
        ("b.c.d=[1, 2]", {"a": 1, "b": {"c": {"d": [1, 2]}}}),
        ("a=", {"a": None}),
        ("a=x=y", {"a": "x=y"}),
        ("a={b: 3e-5}", {"a": {"b": 3e-5}}),
    ],
)
def test_an_override_sets_one_dotted_key(override: str, after: object) -> None:
    raw: dict[str, Any] = {"a": 1}
    apply_override(raw, override)
    assert raw == after


def test_an_override_may_go_below_a_key_that_is_there_but_empty() -> None:
    raw: dict[str, Any] = {"lora": None}
    apply_override(raw, "lora.r=4")
    assert raw == {"lora": {"r": 4}}


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rat": 1}, "x.rat: unknown key; did you mean 'rate'?"),
        ({"zzz": 1}, "x.zzz: unknown key; known: extra, inner, kind, rate, template, workers"),
        ({"rate": "1e-3"}, "x.rate: input should be a valid number, got '1e-3'"),
        ({"rate": True}, "x.rate: input should be a valid number, got True"),
        ({"rate": 0}, "x.rate: input should be greater than 0, got 0"),
        ({"workers": 1.0}, "x.workers: input should be a valid integer, got 1.0"),
        ({"kind": "c"}, "x.kind: input should be 'a' or 'b', got 'c'"),
        ({"inner": {"rnk": 1}}, "x.inner.rnk: unknown key; did you mean 'rank'?"),
        ({"inner": {"names": 5}}, "x.inner.names: input should be a valid string, got 5"),
        ({"inner": {"names": ["a", 5]}}, "x.inner.names: input should be a valid string, got ['a', 5]"),
        ({"extra": {5: 1}}, "x.extra.5: input should be a valid string, got 5"),
        ({"template": "x" * 200, "rate": "y" * 200}, "x.rate: input should be a valid number, got '" + "y" * 76 + "..."),
        ([], "x: input should be a valid dictionary or instance of Recipe, got []"),
        ({"rate": None, "rta": 1}, "x.rta: unknown key; did you mean 'rate'?"),
    ],
)
def test_a_mistake_is_answered_with_the_dotted_path_the_value_and_the_fix(raw: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(Recipe, raw, "x")
    assert str(caught.value) == message


def test_whole_numbers_are_numbers() -> None:
    assert validate(Recipe, {"rate": 1}, "x").rate == 1.0


def test_a_checked_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().rate = 2.0  # type: ignore[misc]


def test_the_nearest_name_is_suggested_or_else_all_are_listed() -> None:
    assert nearest("learning_rte", ["learning_rate", "seed"]) == "did you mean 'learning_rate'?"
    assert nearest("xyz", ["b", "a"]) == "known: a, b"


# --- identity --------------------------------------------------------------------------------------------------------


def test_identity_is_what_changes_the_bytes_and_differs_from_its_default() -> None:
    assert identity(Recipe(), "x") == {}
    assert identity(Recipe(rate=1e-3, workers=7, kind="a", inner=None, extra={}), "x") == {}
    assert identity(Recipe(rate=2, inner=Inner(rank=8), extra={"a": [1]}), "x") == {"rate": 2.0, "inner": {}, "extra": {"a": [1]}}


def test_a_field_that_names_a_file_counts_by_what_the_file_holds(tmp_path: Path) -> None:
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(content)
    a, b, c = (identity(Recipe(template=str(tmp_path / name)), "x") for name in "abc")
    assert a == b != c
    with pytest.raises(UserError, match=r"^x.template: /none/x cannot be read \(No such file or directory\); give the path of a file$"):
        identity(Recipe(template="/none/x"), "x")


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [
        ("some-org/some-base", True),
        ("o/m.v2", True),
        ("gpt2", False),
        ("./some-org/some-base", False),
        ("/abs/path", False),
        ("a/b/c", False),
        ("data/prefs.jsonl", False),
        ("posttrain/data", False),  # is on this disk
        ("o/" + "x" * 5000, False),
        ("", False),
    ],
)
def test_what_reads_as_a_hub_id(name: str, is_hub: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert is_hub_id(name) == is_hub


def test_a_pinned_hub_source_needs_no_network_to_be_planned() -> None:
    assert ModelSource(model="some-org/some-base", revision=COMMIT).revision == COMMIT
    assert DataSource(data=[f"some-org/some-set@{COMMIT}", "./own.jsonl"]).paths == [f"some-org/some-set@{COMMIT}", "./own.jsonl"]


def test_every_shipped_pipeline_file_is_valid() -> None:
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        assert read_pipeline(path).stages


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_shows_types_as_one_writes_them_and_the_fields_of_nested_configs() -> None:
    rows = {name: (kind, default, text) for name, kind, default, text in fields_help(Recipe)}
    assert rows == {
        "workers": ("int", "1", "Workers."),
        "rate": ("float", "0.001", "Rate."),
        "kind": ("'a' | 'b'", "'a'", "Kind."),
        "inner": ("Inner | None", "None", "Inner."),
        "inner.rank": ("int", "8", "Rank."),
        "inner.names": ("str | list[str]", "'all'", "Names."),
        "template": ("str | None", "None", "Template."),
        "extra": ("dict[str, Any]", "{}", "Extra."),
    }

"""Steps that look at one row at a time: on any text, of any length, in as many processes as there are cores."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.curate import each
from posttrain.curate.answers import Boilerplate, Markup, Placeholders, Refusals
from posttrain.curate.pii import Pii
from posttrain.curate.records import to_record
from posttrain.curate.step import Step
from posttrain.curate.text import Language, Length, Normalize
from posttrain.data.formats import convert
from tests.posttrain.curate.bench import apply, candidates_of, chat

STEPS: list[Step] = [Normalize(), Language(), Length(), Refusals(), Boilerplate(), Placeholders(), Markup(), Pii()]
NAMES = [step.name for step in STEPS]
SYNTAX = "`~<>/|[]{}()$@.:-+\\'\" \n\t0123456789abcAI\u200d\u2028é我👍"
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(SYNTAX, max_size=200)


@pytest.mark.parametrize("step", [step for step in STEPS if step.name != "language"], ids=lambda step: step.name)
def test_any_text_is_kept_mended_or_dropped_and_what_is_kept_is_still_a_row(step: Step) -> None:
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(prompt=TEXT.filter(str.strip), answer=TEXT.filter(str.strip))
    def check(prompt: str, answer: str) -> None:
        outcome = apply(step, [chat(answer, prompt)])
        assert len(outcome.kept) + len(outcome.dropped) == 1
        for kept in outcome.kept:
            convert(to_record(kept.row), "messages", "x")
        again = apply(step, [kept.row for kept in outcome.kept])
        assert [kept.row for kept in again.kept] == [kept.row for kept in outcome.kept], "once is enough"

    check()


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
@pytest.mark.parametrize(
    "unit", ["a", "1", "<", "`", "[", "{{", "|-", "@", "a@", "a.", "1-", "1 ", " ", "AA11 ", "::", "<a ", "[Your ", "sorry "]
)
def test_no_text_takes_long(step: Step, unit: str) -> None:
    started = time.process_time()
    apply(step, [chat("x" + unit * (100_000 // len(unit)))])
    assert time.process_time() - started < 10, "a pattern tries every way to match"


def test_rows_are_judged_in_many_processes_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat(("I cannot help you. " if n % 7 == 0 else "Fine. ") + f"a{n}@mail.org", origin=str(n)) for n in range(1000)]
    found = []
    for size in (100, 333, 5000):
        monkeypatch.setattr(each, "ROWS_AT_ONCE", size)
        found.append([apply(step, rows) for step in (Refusals(), Pii())])
    assert found[0] == found[1] == found[2]
    numbers = [candidate.index for candidate in candidates_of(rows)]
    assert [drop.index for drop in found[0][0].dropped] == numbers[::7]
    assert [kept.index for kept in found[0][1].kept] == numbers
    assert found[0][1].changes == {"email": 1000}

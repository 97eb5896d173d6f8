"""What any answer shows: whether it goes round, and in which language it is."""

import json

import pytest

from posttrain.metrics.generated import is_looping, repetition
from posttrain.metrics.language import has_drifted

ENGLISH = "Could you please explain to me how a bicycle stays upright while somebody rides it?"
GERMAN = "Ein Fahrrad bleibt aufrecht, weil sich das Vorderrad beim Fahren immer wieder unter den Schwerpunkt dreht."
FRENCH = "Le vélo reste debout parce que la roue avant tourne toujours sous le centre de gravité du cycliste."
CODE = "```python\n" + "für_alle_räder = [drehen(rad) for rad in fahrrad.räder if rad.ist_vorne]\n" * 5 + "```\nIt turns the front wheel."


@pytest.mark.parametrize(
    ("ids", "share", "loops"),
    [
        ([1, 2, 3], 0.0, False),
        (list(range(50)), 0.0, False),
        ([1, 2] * 10, 1 - 2 / 17, True),
        ([*range(10), *range(10), *range(10)], 1 - 10 / 27, True),
        ([*range(20), 0, 1, 2, 3], 1 / 21, False),
        ([], 0.0, False),
    ],
)
def test_repetition_is_the_share_of_runs_that_were_there_before(ids: list[int], share: float, loops: bool) -> None:
    assert repetition(ids) == pytest.approx(share)
    assert is_looping(repetition(ids)) is loops


@pytest.mark.parametrize(
    ("question", "answer", "drifted"),
    [
        (ENGLISH, GERMAN, True),
        (ENGLISH, ENGLISH, False),
        (GERMAN, GERMAN, False),
        (GERMAN, FRENCH, True),
        (ENGLISH, "42", False),
        (ENGLISH, "Das Vorderrad dreht sich nach vorne.", False),
        (ENGLISH, "", False),
        (ENGLISH, CODE, False),
        ("Why?", GERMAN, None),
        ("12 + 30 = ?", "42", None),
    ],
)
def test_an_answer_drifts_where_enough_of_it_is_in_another_language(question: str, answer: str, drifted: bool | None) -> None:
    assert has_drifted(question, answer, []) is drifted


def test_an_answer_whose_language_is_asked_for_does_not_drift() -> None:
    asked = json.dumps({"kind": "instruction", "id": "language:response_language", "language": "de"})
    assert has_drifted(ENGLISH, GERMAN, [asked]) is None

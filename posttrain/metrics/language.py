"""Language drift: an answer in another language than its question, as py3langid guesses both (Lui and Baldwin, 2012; Barbaresi).

Only prose is judged, without code and links, and only where there is enough of it: a short answer, or one in doubt, has not drifted, and a
question that is too short, or in doubt, says nothing of its answer. Who asks for a translation gets an answer in another language too:
that counts as drift of every policy, so look at the difference.
"""

import json
from collections.abc import Sequence

from posttrain.curate.text import NO_LANGUAGE, language_of

MIN_LETTERS = 40
"""Letters that a text must have to be judged, one of Chinese or Japanese counting three."""
MIN_CONFIDENCE = 0.7


def has_drifted(question: str, answer: str, checks: Sequence[str]) -> bool | None:
    """Whether the answer is in another language than the question; None where that cannot be told, or a check asks for a language."""
    if any(json.loads(check).get("id") == "language:response_language" for check in checks):
        return None
    asked = _language(question)
    if asked is None:
        return None
    said = _language(answer)
    return said is not None and said != asked


def _language(text: str) -> str | None:
    """The code of its language, None where that is in doubt."""
    guessed = language_of(text, min_letters=MIN_LETTERS)
    return guessed[0] if guessed and guessed[0] != NO_LANGUAGE and guessed[1] >= MIN_CONFIDENCE else None

"""The quickstart's texts: a corpus to pretrain on, instructions to learn, pairs to prefer, held-out questions to be measured on.

All of it is synthetic, written by the functions below from the word lists that follow: no outside data, no network, and
the standard library alone. The same seed gives the same bytes on every machine.

Seven task families (`FAMILIES`) share one controlled English of about 200 words. Each `Example` has a `key`, what is asked
without the phrasing (the list, the two numbers, the word). A hash of the key puts it in one of three parts, so that the
prompts of `sft`, `pairs` and `heldout` are disjoint by construction, in whatever words they are phrased. The corpus never
solves a held-out example. The one exception is meant: opposites are knowledge, so the corpus tells all of them as facts,
and held-out opposites measure whether an instruction-tuned model can use what its base model knew.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["sft", "pairs", "heldout"]
Row = dict[str, Any]


def _split(text: str) -> list[str]:
    return text.split()


NOUNS = _split(
    "apple bear bell boat book bread cake corn cow cup dog drum duck egg fish frog goat hat horse king lamp lion milk moon nut pig "
    "rice rose ship snow star tree wolf wood"
)
THINGS = _split("ball bell boat book box cup drum hat kite lamp ring shoe")
COLORS = _split("black blue brown green pink red white")
NAMES = _split("Ana Ben Eva Jon Leo Max Mia Paul Sam Tom")
PLACES = _split("farm hill house lake park river road school")
VERBS = _split("found lost saw left")
ORDINALS = _split("first second third fourth fifth")
OPPOSITES = [
    pair.split("-")
    for pair in _split(
        "hot-cold big-small up-down in-out day-night open-shut old-new fast-slow good-bad happy-sad high-low long-short wet-dry "
        "rich-poor hard-soft light-dark early-late full-empty strong-weak thick-thin true-false win-lose buy-sell give-take "
        "push-pull come-go love-hate start-end top-bottom near-far front-back before-after loud-quiet clean-dirty wide-narrow "
        "deep-shallow sharp-dull sweet-sour ask-tell laugh-cry"
    )
]
CARELESS_SHARE = 0.6
"""How many of the instruction rows that ask for a form (JSON, at most three words) are answered without regard to it. SFT
imitates what it is shown, so it learns that too; the preference pairs are what teaches to prefer the form asked for."""


@dataclass(frozen=True)
class Example:
    """One question: what is asked, the right answer, how it is checked, and the mistakes that a half-trained model makes."""

    family: str
    key: str
    prompt: str
    answer: str
    checks: tuple[Row, ...]
    mistakes: tuple[str, ...]
    careless: str | None = None
    """What is right in substance, but not in the form that was asked for."""


# ---------------------------------------------------------------------------------------------------------------- families
# Each takes what it is about, such as the list of words, or draws it; so the corpus can ask several things about one list.


def reverse(rng: random.Random, about: Sequence[str] = ()) -> Example:
    """A list of words, backwards."""
    words = list(about) or _words(rng, 3, 5)
    listed, right = " ".join(words), words[::-1]
    prompt = rng.choice([f"Write these words in reverse order: {listed}", f"Turn this list around: {listed}"])
    wrong = [" ".join(w) for w in (_swapped(rng, right), _miscopied(rng, right), _repeated(rng, right), right[:-1], words)]
    return _exact("reverse", listed, prompt, " ".join(right), wrong)


def pick(rng: random.Random, about: Sequence[str] = ()) -> Example:
    """The n-th word of a list."""
    words = list(about) or _words(rng, 3, 5)
    at = rng.randrange(len(words))
    listed = " ".join(words)
    prompt = rng.choice(
        [f"What is the {ORDINALS[at]} word of this list: {listed}", f"Look at this list: {listed}. Name the {ORDINALS[at]} word."]
    )
    others = [word for word in words if word != words[at]]
    return _exact("pick", f"{ORDINALS[at]} {listed}", prompt, words[at], [*others, f"{words[at]} {others[0]}"])


def count(rng: random.Random, about: Sequence[str] = ()) -> Example:
    """How many words a list has."""
    words = list(about) or _words(rng, 2, 7)
    listed, right = " ".join(words), len(words)
    prompt = rng.choice([f"How many words are in this list: {listed}", f"Count these words: {listed}"])
    return Example("count", listed, prompt, str(right), ({"kind": "final_number", "answer": str(right)},), (str(right - 1), str(right + 1)))


def add(rng: random.Random, about: Sequence[str] = ()) -> Example:
    """The sum of two numbers up to 30."""
    a, b = (int(n) for n in about or (str(rng.randint(1, 30)), str(rng.randint(1, 30))))
    right = a + b
    prompt = rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}."])
    without_carry = (a // 10 + b // 10) * 10 + right % 10
    wrong = {right - 1, right + 1, right - 2, right + 2, right + 10, abs(right - 10), without_carry} - {right}
    mistakes = tuple(str(n) for n in sorted(wrong) if n >= 0)
    return Example("add", f"{a} + {b}", prompt, str(right), ({"kind": "final_number", "answer": str(right)},), mistakes)


def opposite(rng: random.Random, about: Sequence[str] = ()) -> Example:
    """The opposite of a word; of a held-out word only the corpus tells it, in prose."""
    word, right = about or rng.sample(rng.choice(OPPOSITES), 2)
    prompt = rng.choice([f"What is the opposite of {word}?", f"Name the opposite of {word}.", f"Which word is the opposite of {word}?"])
    foreign = [w for pair in rng.sample(OPPOSITES, 3) for w in pair if w != right]
    return _exact("opposite", word, prompt, right, [word, *foreign])


def record(rng: random.Random, about: Sequence[str] = ()) -> Example:
    """Two people with a coloured thing each; one of them as JSON."""
    name, color, thing, other, other_color, other_thing = about or _owners(rng)
    owners = [f"{name} has a {color} {thing}.", f"{other} has a {other_color} {other_thing}."]
    rng.shuffle(owners)
    story = " ".join(owners)
    prompt = rng.choice([f"{story} Give the name and the color of {name} as JSON.", f"{story} Write a JSON record of {name}."])
    answer = _json(name, color)
    foreign = rng.choice([c for c in COLORS if c not in (color, other_color)])
    wrong = (_json(name, other_color), _json(name, other_color), _json(other, color), _json(name, foreign), answer[:-1], f"{name}: {color}")
    checks = ({"kind": "json_validity", "required_keys": ["name", "color"]}, {"kind": "exact_answer", "answer": answer})
    return Example("record", " ".join(sorted(owners)), prompt, answer, checks, wrong, careless=f"The record of {name} is {answer}")


def short(rng: random.Random, about: Sequence[str] = ()) -> Example:
    """A question about a story of one sentence, to be answered in at most three words."""
    name, verb, color, thing, place = about or _scene(rng)
    story = f"{name} {verb} a {color} {thing} at the {place}."
    ask = rng.choice(["who", "where", "what"])
    question = {"who": f"Who {verb} it?", "where": f"Where was the {thing}?", "what": f"What was at the {place}?"}[ask]
    answers = [(n, f"at the {p}", f"a {c} {t}") for n, _, c, t, p in ((name, verb, color, thing, place), _scene(rng), _scene(rng))]
    right, *wrong = (dict(zip(("who", "where", "what"), answer, strict=True))[ask] for answer in answers)
    prompt = f"{story} {question} Use at most three words."
    checks = ({"kind": "length_limits", "max_words": 3}, {"kind": "exact_answer", "answer": right})
    mistakes = [*wrong, *(a for a in answers[0] if a != right), story]
    careless = {
        "who": f"It was {name} who {verb} the {thing}.",
        "where": f"The {thing} was at the {place}, where {name} {verb} it.",
        "what": f"There was a {color} {thing} at the {place}.",
    }[ask]
    return Example("short", f"{story} {question}", prompt, right, checks, tuple(m for m in mistakes if m != right), careless)


FAMILIES = {f.__name__: f for f in (reverse, pick, count, add, opposite, record, short)}


# -------------------------------------------------------------------------------------------------------------- the data


def part_of(family: str, key: str) -> Part:
    """Which part of the data an example belongs to: a hash of what it asks, so no key is ever in two."""
    slot = hashlib.sha256(f"{family}|{key}".encode()).digest()[0] % 20
    return "heldout" if slot < 4 else "pairs" if slot < 11 else "sft"


def examples(part: Part, num: int, seed: int) -> list[Example]:
    """`num` examples of one part, the families in turn, no prompt twice; a family whose prompts are used up drops out."""
    rng = random.Random(f"{part}-{seed}")
    seen: set[str] = set()
    families = list(FAMILIES.values())
    found: list[Example] = []
    while len(found) < num:
        family = families[len(found) % len(families)]
        if e := _fresh(rng, family, part, seen):
            found.append(e)
            seen.add(e.prompt)
        else:
            families.remove(family)
    return found


def sft_rows(num: int, seed: int = 0) -> list[Row]:
    """Instruction rows, as real ones are: most answers are right, but where a form is asked for, most miss it (`CARELESS_SHARE`)."""
    rng = random.Random(f"careless-{seed}")
    rows = []
    for e in examples("sft", num, seed):
        answer = e.careless if e.careless and rng.random() < CARELESS_SHARE else e.answer
        rows.append({"messages": _messages(e.prompt, answer), "family": e.family})
    return rows


def pair_rows(num: int, seed: int = 0, part: Part = "pairs") -> list[Row]:
    """Preference rows: the right answer over a mistake."""
    rng = random.Random(f"mistakes-{part}-{seed}")
    rows = []
    for e in examples(part, num, seed):
        user, chosen = _messages(e.prompt, e.answer)
        rejected = {"role": "assistant", "content": _mistake(rng, e)}
        rows.append({"prompt": [user], "chosen": [chosen], "rejected": [rejected], "family": e.family})
    return rows


def heldout_rows(num: int, seed: int = 0) -> list[Row]:
    """Held-out instructions, with the checks that an answer must pass."""
    rows = examples("heldout", num, seed)
    return [{"messages": _messages(e.prompt, e.answer), "checks": list(e.checks), "family": e.family} for e in rows]


# ------------------------------------------------------------------------------------------------------------- the corpus


def corpus(num: int, seed: int = 0) -> Iterator[str]:
    """`num` documents of plain text, each of one kind: a work sheet with solutions, or a few sentences of prose."""
    rng = random.Random(f"corpus-{seed}")
    for _ in range(num):
        write = rng.choice(_SHEETS if rng.random() < 0.7 else _PROSE)
        yield write(rng)


def _list_sheet(rng: random.Random) -> str:
    words = _words(rng, 2, 5)
    return _sheet(rng, [reverse, pick, reverse, pick, count], words, 4)


def _count_sheet(rng: random.Random) -> str:
    return _sheet(rng, [count, count], (), 2)


def _sum_sheet(rng: random.Random) -> str:
    return _sheet(rng, [add, add, add], (), 3)


def _opposite_sheet(rng: random.Random) -> str:
    return _sheet(rng, [opposite, opposite, opposite], (), 3)


def _record_sheet(rng: random.Random) -> str:
    name, color, thing, other, other_color, other_thing = about = _owners(rng)
    return "\n".join([_sheet(rng, [record], about, 1), _sheet(rng, [record], (other, other_color, other_thing, name, color, thing), 1)])


def _story_sheet(rng: random.Random) -> str:
    return _sheet(rng, [short, short], _scene(rng), 2)


def _sheet(rng: random.Random, families: Sequence[Callable[..., Example]], about: Sequence[str], num: int) -> str:
    """Exercises with their solutions, sometimes as a script that names who answers; a held-out one is left out."""
    asked = [family(rng, about) for family in rng.sample(families, num)]
    speaker = f"{rng.choice([*NAMES, 'assistant', 'assistant'])}\n" if rng.random() < 0.5 else ""
    return "\n".join(f"{e.prompt}\n{speaker}{e.answer}" for e in asked if part_of(e.family, e.key) != "heldout")


def _about_list(rng: random.Random) -> str:
    """Copying is what most of the tasks are built on, so the corpus repeats many lists."""
    words = " ".join(_words(rng, 3, 7))
    return rng.choice([f"Say it again: {words}\n{words}", f"{words} and again {words}.", f"Repeat {words}: {words}"])


def _about_sums(rng: random.Random) -> str:
    asked = [e for e in (add(rng) for _ in range(4)) if part_of(e.family, e.key) != "heldout"]
    return " ".join(f"{e.key} = {e.answer}." if rng.random() < 0.5 else f"{e.key} is\n{e.answer}" for e in asked)


def _about_opposites(rng: random.Random) -> str:
    told = [opposite(rng) for _ in range(4)]
    speaker = rng.choice([*NAMES, "assistant"])
    forms = ("The opposite of {} is {}.", "Opposite of {}:\n{}\n", f"Opposite of {{}}?\n{speaker}\n{{}}\n")
    return " ".join(rng.choice(forms).format(e.key, e.answer) for e in told)


def _about_people(rng: random.Random) -> str:
    name, color, thing, other, other_color, other_thing = _owners(rng)
    facts = [f"The {thing} is {color}.", f"The {other_thing} is {other_color}.", f"{name} likes {color}.", f"{other} likes {other_color}."]
    return f"{name} has a {color} {thing}. {other} has a {other_color} {other_thing}. " + " ".join(rng.sample(facts, 2))


def _about_talk(rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(NOUNS)
    told = [
        f"The user asks about the {thing} and the assistant\nanswers.",
        f"An assistant helps the user\n{name} to write about the {thing}.",
    ]
    return rng.choice(told)


_SHEETS = (_list_sheet, _list_sheet, _list_sheet, _count_sheet, _sum_sheet, _opposite_sheet, _record_sheet, _story_sheet)
_PROSE = (_about_list, _about_list, _about_sums, _about_opposites, _about_opposites, _about_people, _about_talk)


# ---------------------------------------------------------------------------------------------------------------- helpers


def _fresh(rng: random.Random, family: Callable[..., Example], part: Part, seen: set[str]) -> Example | None:
    """An example of the part whose prompt is new, or None where hundreds of draws brought none."""
    for _ in range(400):
        e: Example = family(rng)
        if part_of(e.family, e.key) == part and e.prompt not in seen:
            return e
    return None


def _words(rng: random.Random, fewest: int, most: int) -> list[str]:
    return rng.sample(NOUNS, rng.randint(fewest, most))


def _owners(rng: random.Random) -> tuple[str, ...]:
    (name, other), (color, other_color), (thing, other_thing) = rng.sample(NAMES, 2), rng.sample(COLORS, 2), rng.sample(THINGS, 2)
    return name, color, thing, other, other_color, other_thing


def _scene(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.choice(words) for words in (NAMES, VERBS, COLORS, THINGS, PLACES))


def _exact(family: str, key: str, prompt: str, answer: str, mistakes: Sequence[str]) -> Example:
    checks = ({"kind": "exact_answer", "answer": answer},)
    return Example(family, key, prompt, answer, checks, tuple(m for m in mistakes if m != answer))


def _swapped(rng: random.Random, words: list[str]) -> list[str]:
    """Two neighbours in the wrong order."""
    at = rng.randrange(len(words) - 1)
    return [*words[:at], words[at + 1], words[at], *words[at + 2 :]]


def _miscopied(rng: random.Random, words: list[str]) -> list[str]:
    """One word replaced by another that is not in the list."""
    at = rng.randrange(len(words))
    return [*words[:at], rng.choice([word for word in NOUNS if word not in words]), *words[at + 1 :]]


def _repeated(rng: random.Random, words: list[str]) -> list[str]:
    """One word replaced by another of the list."""
    at, source = rng.sample(range(len(words)), 2)
    return [*words[:at], words[source], *words[at + 1 :]]


def _mistake(rng: random.Random, e: Example) -> str:
    """An answer to reject: one in the wrong form, a mistake of the family's own, or now and then the right answer with chatter."""
    if e.careless and rng.random() < 0.7:
        return e.careless
    chatter = [f"Sure! {e.answer}", f"{e.answer} {e.answer}", f"The answer is {e.answer}."]
    return rng.choice(chatter if rng.random() < 0.1 else e.mistakes)


def _json(name: str, color: str) -> str:
    return json.dumps({"name": name, "color": color})


def _messages(prompt: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

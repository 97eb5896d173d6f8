"""The quickstart's texts: a corpus to pretrain on, instructions to learn, pairs to prefer, held-out questions to be measured on.

All of it is synthetic, written by the functions below from the word lists that follow: no outside data, no network, and
the standard library alone. The same seed gives the same bytes on every machine.

Eight task families (`FAMILIES`) share one controlled English of about 200 words. Each `Example` has a `key`, what is asked
without the phrasing (the list, the two numbers, the word). A hash of the key puts it in one of three parts, so that the
prompts of `sft`, `pairs` and `heldout` are disjoint by construction, in whatever words they are phrased. The corpus never
holds a held-out list, sum or story. The one exception is meant: opposites are knowledge, so the corpus tells all of
them, and held-out opposites measure whether an instruction-tuned model can use what its base model knew.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["sft", "pairs", "heldout"]
Row = dict[str, Any]

NOUNS = (
    "apple bear bell boat book bread cake corn cow cup dog drum duck egg fish frog goat hat hill horse king lamp lion milk moon "
    "nut pear pig queen rice rose ship snow soup star sun tree wind wolf wood"
).split()
THINGS = "ball bell boat book box cap chair coat cup drum hat kite lamp ring shoe".split()
COLORS = "black blue brown gray green pink red white".split()
NAMES = "Ana Ben Eva Jon Lea Leo Max Mia Nina Paul Sam Tom Una Zoe".split()
PLACES = "farm garden hill house lake park river road school shop".split()
VERBS = "found lost saw left hid".split()
ORDINALS = "first second third fourth fifth".split()
OPPOSITES = [
    tuple(pair.split("-"))
    for pair in (
        "hot-cold big-small up-down in-out day-night open-shut old-new fast-slow good-bad happy-sad high-low long-short wet-dry "
        "rich-poor hard-soft light-dark early-late full-empty strong-weak thick-thin true-false win-lose buy-sell give-take push-pull "
        "come-go love-hate start-end top-bottom left-right near-far front-back before-after loud-quiet clean-dirty young-aged "
        "wide-narrow deep-shallow sharp-dull safe-risky brave-afraid kind-cruel sweet-sour smooth-rough alive-dead ask-tell "
        "laugh-cry rise-fall north-south east-west summer-winter friend-enemy heaven-hell always-never many-few more-less "
        "inside-outside above-below arrive-leave begin-finish"
    ).split()
]


@dataclass(frozen=True)
class Example:
    """One question: what is asked, the right answer, how it is checked, and the mistakes that a half-trained model makes."""

    family: str
    key: str
    prompt: str
    answer: str
    checks: tuple[Row, ...]
    mistakes: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------- families


def reverse(rng: random.Random) -> Example:
    """A list of words, backwards."""
    words = _words(rng, 3, 5)
    listed = ", ".join(words)
    prompt = rng.choice([f"Write these words in reverse order: {listed}", f"Turn this list around: {listed}"])
    return _list_example(rng, "reverse", words, prompt, words[::-1])


def sort(rng: random.Random) -> Example:
    """A list of words, by the alphabet."""
    words = _words(rng, 3, 4)
    listed = ", ".join(words)
    prompt = rng.choice([f"Sort these words by the alphabet: {listed}", f"Put this list in alphabetical order: {listed}"])
    return _list_example(rng, "sort", words, prompt, sorted(words))


def pick(rng: random.Random) -> Example:
    """The n-th word of a list."""
    words = _words(rng, 4, 5)
    at = rng.randrange(len(words))
    listed = ", ".join(words)
    prompt = rng.choice([f"What is the {ORDINALS[at]} word of this list: {listed}", f"Look at {listed}. Name the {ORDINALS[at]} word."])
    near = [words[i] for i in (at - 1, at + 1) if 0 <= i < len(words)]
    return _exact("pick", f"{ORDINALS[at]} {listed}", prompt, words[at], [*near, f"{words[at]}, {near[0]}"])


def count(rng: random.Random) -> Example:
    """How many words a list has."""
    words = _words(rng, 2, 7)
    listed = ", ".join(words)
    prompt = rng.choice([f"How many words are in this list: {listed}", f"Count these words: {listed}"])
    wrong = [str(n) for n in (len(words) - 1, len(words) + 1)]
    return Example("count", listed, prompt, str(len(words)), ({"kind": "final_number", "answer": len(words)},), tuple(wrong))


def add(rng: random.Random) -> Example:
    """The sum of two numbers up to 30."""
    a, b = rng.randrange(1, 31), rng.randrange(1, 31)
    total = a + b
    prompt = rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}."])
    no_carry = (a // 10 + b // 10) * 10 + (a + b) % 10
    wrong = {total - 1, total + 1, total + 10, total - 10, no_carry} - {total}
    mistakes = tuple(str(n) for n in sorted(wrong) if n >= 0)
    return Example("add", f"{a} + {b}", prompt, str(total), ({"kind": "final_number", "answer": total},), mistakes)


def opposite(rng: random.Random) -> Example:
    """The opposite of a word, which only the corpus tells for held-out words."""
    pair = rng.choice(OPPOSITES)
    word, answer = pair if rng.random() < 0.5 else pair[::-1]
    prompt = rng.choice([f"What is the opposite of {word}?", f"Name the opposite of {word}.", f"Which word is the opposite of {word}?"])
    other = rng.choice([w for w in rng.choice(OPPOSITES) if w != answer])
    return _exact("opposite", word, prompt, answer, [word, other])


def record(rng: random.Random) -> Example:
    """Two people with a coloured thing each; one of them as JSON."""
    (name, other), (color, other_color) = rng.sample(NAMES, 2), rng.sample(COLORS, 2)
    thing, other_thing = rng.sample(THINGS, 2)
    owners = [f"{name} has a {color} {thing}.", f"{other} has a {other_color} {other_thing}."]
    rng.shuffle(owners)
    story = " ".join(owners)
    prompt = rng.choice([f"{story} Give the name and the color of {name} as JSON.", f"{story} Write a JSON record of {name}."])
    answer = _json(name, color)
    mistakes = (_json(name, other_color), _json(other, other_color), _json(name, thing), answer[:-1], f'{{"name": "{name}"}}', f"{name}: {color}")
    checks = ({"kind": "json_validity", "required_keys": ["name", "color"]}, {"kind": "exact_answer", "answer": answer})
    return Example("record", story, prompt, answer, checks, mistakes)


def short(rng: random.Random) -> Example:
    """A question about a one-sentence story, to be answered in at most three words."""
    name, verb, color = rng.choice(NAMES), rng.choice(VERBS), rng.choice(COLORS)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    story = f"{name} {verb} a {color} {thing} at the {place}."
    question, answer, wrong = rng.choice(
        [
            (f"Who {verb} a {thing}?", name, rng.choice([n for n in NAMES if n != name])),
            ("Where was it?", f"at the {place}", f"at the {rng.choice([p for p in PLACES if p != place])}"),
            ("What was it?", f"a {color} {thing}", f"a {color} {rng.choice([t for t in THINGS if t != thing])}"),
        ]
    )
    prompt = f"{story} {question} Use at most three words."
    checks = ({"kind": "length_limits", "max_words": 3}, {"kind": "exact_answer", "answer": answer})
    return Example("short", f"{story} {question}", prompt, answer, checks, (wrong, f"{answer} {_tail(rng, name, place)}", story))


FAMILIES: dict[str, Callable[[random.Random], Example]] = {
    f.__name__: f for f in (reverse, sort, pick, count, add, opposite, record, short)
}


# -------------------------------------------------------------------------------------------------------------- the data


def part_of(family: str, key: str) -> Part:
    """Which part of the data an example belongs to: a hash of what it asks, so no key is ever in two."""
    slot = hashlib.sha256(f"{family}|{key}".encode()).digest()[0] % 20
    return "heldout" if slot < 4 else "pairs" if slot < 11 else "sft"


def examples(part: Part, num: int, seed: int) -> list[Example]:
    """`num` examples of one part, the families in turn; no prompt twice, where the family has enough of them."""
    rng = random.Random(f"{part}-{seed}")
    seen: set[str] = set()
    found = []
    for i in range(num):
        found.append(_fresh(rng, list(FAMILIES.values())[i % len(FAMILIES)], part, seen))
    return found


def sft_rows(num: int, seed: int = 0) -> list[Row]:
    """Instruction rows: a question and its right answer."""
    return [{"messages": _messages(e.prompt, e.answer), "family": e.family} for e in examples("sft", num, seed)]


def pair_rows(num: int, seed: int = 0, part: Part = "pairs") -> list[Row]:
    """Preference rows: the right answer over a mistake."""
    rng = random.Random(f"mistakes-{seed}")
    rows = []
    for e in examples(part, num, seed + 1 if part == "heldout" else seed):
        user, chosen = _messages(e.prompt, e.answer)
        rejected = _mistake(rng, e)
        rows.append({"prompt": [user], "chosen": [chosen], "rejected": [{"role": "assistant", "content": rejected}], "family": e.family})
    return rows


def heldout_rows(num: int, seed: int = 0) -> list[Row]:
    """Held-out instructions, with the checks that an answer must pass."""
    return [
        {"messages": _messages(e.prompt, e.answer), "checks": list(e.checks), "family": e.family} for e in examples("heldout", num, seed)
    ]


# ------------------------------------------------------------------------------------------------------------- the corpus


def corpus(num: int, seed: int = 0) -> Iterator[str]:
    """`num` documents of plain text, each of one kind: a few sentences of prose, or a few exercises with their solutions."""
    rng = random.Random(f"corpus-{seed}")
    for _ in range(num):
        if rng.random() < 0.6:
            family = rng.choice(list(FAMILIES.values()))
            yield "\n".join(_exercise(rng, family) for _ in range(2))
        else:
            write = rng.choice(_PROSE)
            yield " ".join(write(rng) for _ in range(1 if write in (_about_list, _about_repeats) else 3))


def _exercise(rng: random.Random, family: Callable[[random.Random], Example]) -> str:
    e = _not_held_out(rng, family)
    return f"{e.prompt}\n{e.answer}"


def _about_list(rng: random.Random) -> str:
    words = _words(rng, 3, 5)
    while any(part_of(family, ", ".join(words)) == "heldout" for family in ("reverse", "sort", "count")):
        words = _words(rng, 3, 5)
    backwards, by_alphabet = ", ".join(words[::-1]), ", ".join(sorted(words))
    facts = [f"There are {len(words)} words.", f"In reverse order: {backwards}.", f"Turned around:\n{backwards}"]
    facts += [f"In alphabetical order: {by_alphabet}.", f"By the alphabet:\n{by_alphabet}"]
    return f"A list of words: {', '.join(words)}. " + " ".join(rng.sample(facts, 3))


def _about_repeats(rng: random.Random) -> str:
    """The cheapest way to teach a small model to copy, which most of the tasks are built on."""
    words = ", ".join(_words(rng, 4, 8))
    return rng.choice([f"Say it again: {words}\n{words}", f"{words} and again {words}.", f"Repeat {words}: {words}"])


def _about_sum(rng: random.Random) -> str:
    e = _not_held_out(rng, add)
    return rng.choice([f"{e.key} = {e.answer}.", f"{e.key} is {e.answer}.", f"The sum of {e.key.replace('+', 'and')} is {e.answer}."])


def _about_opposite(rng: random.Random) -> str:
    e = opposite(rng)
    told = [f"The opposite of {e.key} is {e.answer}.", f"{e.key} - {e.answer}\n", f"Opposite of {e.key}:\n{e.answer}\n"]
    return rng.choice(told)


def _about_owner(rng: random.Random) -> str:
    e = _not_held_out(rng, record)
    fields = json.loads(e.answer)
    return f"{e.key} " + rng.choice([f"Record of {fields['name']}: {e.answer}", f"The color of {fields['name']} is {fields['color']}."])


def _about_story(rng: random.Random) -> str:
    e = _not_held_out(rng, short)
    story, _, question = e.key.partition(". ")
    name, verb, *_ = story.split()
    told = {"Who": f"{e.answer} {verb} it.", "Where": f"It was {e.answer}.", "What": f"It was {e.answer}."}
    return f"{story}. {told[question.split()[0]]}"


def _about_talk(rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(NOUNS)
    return rng.choice(
        [
            f"The user asks about the {thing} and the assistant\nanswers.",
            f"An assistant helps the user\n{name} to write about the {thing}.",
        ]
    )


_PROSE = (_about_list, _about_repeats, _about_repeats, _about_sum, _about_opposite, _about_opposite, _about_owner, _about_story, _about_talk)


# ---------------------------------------------------------------------------------------------------------------- helpers


def _words(rng: random.Random, fewest: int, most: int) -> list[str]:
    return rng.sample(NOUNS, rng.randint(fewest, most))


def _not_held_out(rng: random.Random, family: Callable[[random.Random], Example]) -> Example:
    """An example that is not held out."""
    while True:
        e = family(rng)
        if part_of(e.family, e.key) != "heldout":
            return e


def _fresh(rng: random.Random, family: Callable[[random.Random], Example], part: Part, seen: set[str]) -> Example:
    """An example of the part, with a prompt not seen yet; a small family repeats its prompts once they are used up."""
    for _ in range(400):
        e = family(rng)
        if part_of(e.family, e.key) == part and e.prompt not in seen:
            break
    else:
        while part_of(e.family, e.key) != part:
            e = family(rng)
    seen.add(e.prompt)
    return e


def _exact(family: str, key: str, prompt: str, answer: str, mistakes: Sequence[str]) -> Example:
    return Example(family, key, prompt, answer, ({"kind": "exact_answer", "answer": answer},), tuple(mistakes))


def _list_example(rng: random.Random, family: str, words: list[str], prompt: str, right: list[str]) -> Example:
    """A list to be answered with a list; the mistakes are two words swapped, one lost, one said twice, one foreign, one left as it was."""
    i, j = sorted(rng.sample(range(len(right)), 2))
    k = rng.randrange(len(right) - 1)
    foreign = rng.choice([word for word in NOUNS if word not in words])
    wrong = [
        [*right[:i], right[j], *right[i + 1 : j], right[i], *right[j + 1 :]],
        [*right[:k], right[k + 1], right[k], *right[k + 2 :]],
        right[:i] + right[i + 1 :],
        [*right[:i], right[j], *right[i + 1 :]],
        [*right[:j], foreign, *right[j + 1 :]],
        words,
    ]
    answer = ", ".join(right)
    return _exact(family, ", ".join(words), prompt, answer, [m for m in (", ".join(w) for w in wrong) if m != answer])


def _mistake(rng: random.Random, e: Example) -> str:
    """A wrong answer: mostly a mistake of the family's own, now and then the right answer with chatter around it."""
    chatter = [f"Sure! {e.answer}", f"{e.answer} {e.answer}", f"The answer is {e.answer}. The answer is {e.answer}."]
    return rng.choice(chatter if rng.random() < 0.1 else e.mistakes)


def _tail(rng: random.Random, name: str, place: str) -> str:
    return rng.choice([f"and {name} was there.", f"and the {place}.", "and more."])


def _json(name: str, color: str) -> str:
    return json.dumps({"name": name, "color": color})


def _messages(prompt: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

"""Whether the verifiable instructions are those of lm-evaluation-harness: the verdicts of both on the same answers.

  python benchmarks/ifeval_agreement.py --lm-eval VENV [--data ../shared/data] [--rows IFEVAL.jsonl] [--cases N] [--json FILE]

An answer is a real one, an odd one, a very long one, one in one of many languages, or marks at random; most are then made to look as
if they followed some instruction. The numbers that an instruction asks for lie around what its answer has, so that both verdicts come
about equally often. `--rows` adds the instructions of IFEval's own rows, each with a few answers.

What is known to differ, and why, is shown apart. `--record FILE` writes the verdicts on answers that are not from the data.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from posttrain.metrics.ifeval import INSTRUCTIONS, Counted, follows, follows_loosely, read_instruction

SOURCES = {
    "llamafactory_demo/alpaca_en_demo.json": ["output"],
    "llamafactory_demo/dpo_en_demo.json": ["chosen", "rejected"],
    "llamafactory_demo/kto_en_demo.json": ["messages"],
    "llamafactory_demo/glaive_toolcall_en_demo.json": ["conversations"],
    "llamafactory_demo/c4_demo.jsonl": ["text"],
    "pandalm_testset/derived_pairs.jsonl": ["chosen", "rejected"],
    "gsm8k_train/train.jsonl": ["answer"],
    "t0_p3_subset/sft.jsonl": ["completion"],
}
MAX_PER_FIELD = 1000

BY_HAND = json.loads((Path(__file__).parent / "odd_answers.json").read_text(encoding="utf-8"))
ODD: list[str] = BY_HAND["odd"]
"""Answers that try where a rule ends."""
LANGUAGES: dict[str, str] = BY_HAND["languages"]
"""An answer in each of many languages."""
LONG = [
    "word " * 3000,
    "Sentence one. " * 500,
    "x" * 20_000,
    "!" * 2000,
    "\n" * 2000 + "a",
    "a " + "*" * 999,
    "[" * 999,
    "<" * 999,
    "1" * 5000,
]

PHRASES = ["Is there anything else I can help with?", "The end.", 'He said "stop"', "thanks"]
MARKS = ["P.S.", "P.P.S", "P.S.", "P.P.S", "PS:"]
SPLITTERS = ["Section", "SECTION", "Day", "PARAGRAPH"]
UNLISTED = ("nl", "sv", "tr", "zh-cn")
"""Languages that langdetect knows, and IFEval does not ask for."""
LISTED = [code for code in LANGUAGES if code not in UNLISTED]

FIRST, LETTER = "length_constraints:nth_paragraph_first_word", "keywords:letter_frequency"
PATTERN = "a text, there a pattern"
KNOWN: list[tuple[str, str, dict[str, Any], str]] = [
    (PATTERN, "keywords:existence", {"keywords": ["C++"]}, "I have a cat."),
    (PATTERN, "keywords:frequency", {"keyword": "3.5", "frequency": 1, "relation": "at least"}, "It weighs 315 g."),
    (PATTERN, "keywords:forbidden_words", {"forbidden_words": ["e.g."]}, "Some, e.g. this one"),
    (PATTERN, "detectable_content:postscript", {"postscript_marker": "P.P.S."}, "P.P.S: a"),
    (PATTERN, "detectable_format:multiple_sections", {"section_spliter": "Part(", "num_sections": 1}, "Part( 1"),
    ("there a random letter", LETTER, {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "#a #b"),
    ("there a random number", "detectable_format:number_bullet_lists", {"num_bullets": 0}, "No bullets."),
    ("there, s at the end of a Greek word", FIRST, {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "ΟΔΟΣ"}, "ΟΔΟΣ"),
    ("there not listed", "language:response_language", {"language": "nl"}, LANGUAGES["nl"]),
    ("too deep to parse", "detectable_format:json_format", {}, "[" * 100_000),
]
"""Why the verdicts differ, and a case in which they do."""


@dataclass(frozen=True)
class Case:
    """An instruction, its fields, an answer, and whether that is of our own making, not from the data."""

    id: str
    fields: dict[str, Any]
    answer: str
    own: bool


def main() -> None:
    """Draw the cases, ask both, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, required=True, help="virtual environment that has lm_eval[ifeval]")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real data sets")
    parser.add_argument("--rows", type=Path, help="IFEval's own rows as JSONL")
    parser.add_argument("--cases", type=int, default=200, help="cases of each instruction")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--record", type=Path, help="file to write verdicts of the reference to")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    real = read_answers(arguments.data)
    print(f"{len(real):,} real answers, {len(ODD) + len(LONG)} odd ones, {len(LANGUAGES)} in some language")
    cases = [draw(name, real, rng) for name in INSTRUCTIONS for _ in range(arguments.cases)]
    if arguments.rows:
        cases += of_rows(arguments.rows, real, rng)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NLTK_DATA": os.environ.get("NLTK_DATA") or write_punkt(Path(folder))}
        theirs = ask(arguments.lm_eval, cases, environment, seed=0)
        again = ask(arguments.lm_eval, cases, environment, seed=None)
        known = ask(arguments.lm_eval, [Case(*case, own=True) for _, *case in KNOWN], environment, seed=0)
    ours = [judge(case) for case in cases]
    table = tabulate(cases, ours, theirs, again)
    print_table(table)
    for case, mine, verdict in zip(cases, ours, theirs, strict=True):
        if mine != verdict:
            print(f"differs: {case.id} {case.fields} ours {mine}, theirs {verdict}, on {case.answer[:300]!r}")
    print("\nKnown to differ [strict, loose]:")
    for (reason, *case), verdict in zip(KNOWN, known, strict=True):
        print(f"  {case[0]} {case[1]} on {case[2][:40]!r}: ours {judge(Case(*case, own=True))}, theirs {str(verdict)[:80]} ({reason})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "table": table}, indent=1) + "\n")
    if arguments.record:
        lines = [
            json.dumps({"id": case.id, **case.fields, "answer": case.answer, "strict": verdict[0], "loose": verdict[1]}, ensure_ascii=False)
            for case, verdict in zip(cases, theirs, strict=True)
            if case.own and len(case.answer) < 400 and not isinstance(verdict, str)
        ]
        arguments.record.write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")


def read_answers(data: Path) -> list[str]:
    """Texts of the data sets, not more than `MAX_PER_FIELD` of each field."""
    found = []
    for name, fields in SOURCES.items():
        text = (data / name).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
        for field in fields:
            texts = [last_text(row[field]) for row in rows[:MAX_PER_FIELD]]
            found += [text for text in texts if text]
    return found


def last_text(value: Any) -> str:
    """The text, that of a message, or that of the last of some."""
    if isinstance(value, list):
        value = value[-1]
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    return value if isinstance(value, str) else ""


def draw(name: str, real: Sequence[str], rng: random.Random) -> Case:
    """An answer, shaped at random, and an instruction called `name` that it may well follow or just miss."""
    own = rng.random() < 0.4
    answer = rng.choice(rng.choice((ODD, list(LANGUAGES.values()), LONG, [scribble(rng)]))) if own else rng.choice(real)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        answer = rng.choice(SHAPES)(answer, rng)
    if name in SHAPED and rng.random() < 0.75:
        answer = rng.choice(SHAPED[name])(answer, rng)
    if rng.random() < 0.15:
        answer = rng.choice((preface, sign_off, embolden, crlf))(answer, rng)
    return Case(name, fields_for(name, answer, rng), answer, own)


def scribble(rng: random.Random) -> str:
    """Marks that instructions are about, at random."""
    return "".join(
        rng.choices(
            ["*", "**", "***", "-", "[", "]", "<<", ">>", '"', "'", ".", ",", "P.S.", "\n", "\n\n", " ", "a", "B", "1"],
            k=rng.randint(1, 30),
        )
    )


def of_rows(path: Path, real: Sequence[str], rng: random.Random) -> list[Case]:
    """Every instruction of IFEval's rows that the harness can decide, each with three answers."""
    cases = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, fields in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            given = {field: value for field, value in fields.items() if value is not None}
            if given.get("letter", "a").isalpha():
                cases += [Case(name, given, draw(name, real, rng).answer, own=False) for _ in range(3)]
    return cases


# Answers made to look as if they followed an instruction.


def pieces(text: str) -> list[str]:
    """The text cut at its sentences."""
    return re.split(r"(?<=[.!?])\s+", text)[:12]


def preface(text: str, rng: random.Random) -> str:
    return rng.choice(("Sure, here it is:\n", "Of course!\n\n", "**Answer**\n", "\n")) + text


def sign_off(text: str, rng: random.Random) -> str:
    return text + rng.choice(("\nLet me know if you need more, please.", "\n\nI hope this helps!", "\n", "\n```"))


def embolden(text: str, rng: random.Random) -> str:
    return f"**{text}**"


def crlf(text: str, rng: random.Random) -> str:
    return text.replace("\n", "\r\n")


def bullets(text: str, rng: random.Random) -> str:
    mark = rng.choice(("* ", "- ", "*", " - ", "** ", "+ ", "• ", "1. "))
    return "\n".join(mark + piece for piece in pieces(text))


def highlights(text: str, rng: random.Random) -> str:
    mark = rng.choice(("*", "**", "***", "_"))
    return " ".join(f"{mark}{word}{mark}" if rng.random() < 0.2 else word for word in text.split(" "))


def sections(text: str, rng: random.Random) -> str:
    splitter = rng.choice(SPLITTERS)
    return "\n".join(f"{splitter}{rng.choice((' ', '', '  '))}{number}\n{piece}" for number, piece in enumerate(pieces(text), 1))


def placeholders(text: str, rng: random.Random) -> str:
    return " ".join(f"[{word}]" if rng.random() < 0.08 else word for word in text.split(" "))


def paragraphs(text: str, rng: random.Random) -> str:
    return rng.choice(("\n\n", "\n\n", "\n\n\n", "***", "\n***\n", " *** ", "\n* * *\n")).join(pieces(text))


def two_responses(text: str, rng: random.Random) -> str:
    half = len(text) // 2
    mark = rng.choice(("******", "\n******\n", "*******", "*****", "******\n******"))
    return mark.join(rng.choice(([text[:half], text[half:]], [text, text], [text[:half], text[half:], ""], ["", text, "x"])))


def postscript(text: str, rng: random.Random) -> str:
    return f"{text}\n\n{rng.choice(('P.S.', 'p.s.', 'P. S.', 'P.P.S', 'P.P.S.', 'P. P. S', 'PS', 'P.S', 'N.B.', 'PS:'))} more"


def title(text: str, rng: random.Random) -> str:
    return f"{rng.choice(('<<A title>>', '<<>>', '<< >>', '<A title>', '<<A>> and <<B>>', '«A title»', '<<<A>>>'))}\n{text}"


def constrained(text: str, rng: random.Random) -> str:
    return rng.choice(("", text)) + rng.choice(("My answer is yes.", "My answer is no", "My answer is maybe.", "my answer is yes."))


def end_phrase(text: str, rng: random.Random) -> str:
    return f"{text} {rng.choice(PHRASES)}" + rng.choice(("", "", ".", '"', " "))


def quotation(text: str, rng: random.Random) -> str:
    return rng.choice(('"{}"', '"{}" ', "“{}”", '"{}', "'{}'", '"{}".')).format(text)


def as_json(text: str, rng: random.Random) -> str:
    body = rng.choice((json.dumps({"answer": text}), json.dumps([text], indent=1), f'{{"answer": "{text}"}}', json.dumps(text)))
    before, after = rng.choice(
        (("", ""), ("```json\n", "\n```"), ("```\n", "\n```"), ("```JSON\n", "```"), ("Here:\n```json\n", "\n```"), ("", ","))
    )
    return before + body + after


def repeat_prompt(text: str, rng: random.Random) -> str:
    return rng.choice((PROMPT, PROMPT.upper(), f" {PROMPT}", PROMPT[:-1], f"> {PROMPT}")) + rng.choice(("\n", " ", "")) + text


PROMPT = "Write a short note to the library. Say when you come."
CASES: list[Callable[[str, random.Random], str]] = [
    lambda text, rng: text.upper(),
    lambda text, rng: text.lower(),
    lambda text, rng: text.title(),
    lambda text, rng: " ".join(word.upper() if rng.random() < 0.1 else word for word in text.split(" ")),
]
SHAPES = [preface, sign_off, embolden, crlf, bullets, highlights, sections, placeholders, paragraphs, two_responses, postscript, title]
SHAPES += [constrained, end_phrase, quotation, as_json, repeat_prompt, *CASES, lambda text, rng: text.replace(",", "")]
SHAPED = {
    "length_constraints:number_paragraphs": [paragraphs],
    "length_constraints:nth_paragraph_first_word": [paragraphs],
    "detectable_content:number_placeholders": [placeholders],
    "detectable_content:postscript": [postscript],
    "detectable_format:number_bullet_lists": [bullets],
    "detectable_format:constrained_response": [constrained],
    "detectable_format:number_highlighted_sections": [highlights],
    "detectable_format:multiple_sections": [sections],
    "detectable_format:json_format": [as_json],
    "detectable_format:title": [title],
    "combination:two_responses": [two_responses],
    "combination:repeat_prompt": [repeat_prompt],
    "startend:end_checker": [end_phrase],
    "startend:quotation": [quotation],
    "change_case:capital_word_frequency": CASES,
    "change_case:english_capital": CASES[:1],
    "change_case:english_lowercase": CASES[1:2],
    "punctuation:no_comma": [SHAPES[-1], quotation],
}


def fields_for(name: str, answer: str, rng: random.Random) -> dict[str, Any]:
    """Fields of the instruction; numbers lie within two of what the answer has."""
    words = re.findall(r"\w+", answer) or ["note"]
    word = rng.choice(words)
    some = [rng.choice((rng.choice(words), "library", word[:3], word.upper())) for _ in range(rng.randint(1, 3))]
    match name.partition(":")[2]:
        case "existence":
            return {"keywords": some}
        case "forbidden_words":
            return {"forbidden_words": some}
        case "frequency":
            return around(name, answer, {"keyword": some[0]}, rng)
        case "letter_frequency":
            return around(name, answer, {"letter": rng.choice("abcdefghijklmnopqrstuvwxyzAEZ")}, rng)
        case "multiple_sections":
            present = [splitter for splitter in SPLITTERS if splitter in answer]
            return around(name, answer, {"section_spliter": rng.choice(present or SPLITTERS)}, rng)
        case "response_language":
            likely = [code for code, text in LANGUAGES.items() if text[:20].casefold() in answer.casefold()] or ["en"]
            return {"language": rng.choice([code for code in likely if code not in UNLISTED] * len(LISTED) + LISTED)}
        case "number_paragraphs":
            return {"num_paragraphs": max(1, len(answer.split("***")) + rng.choice((-1, 0, 0, 0, 1)))}
        case "nth_paragraph_first_word":
            parts = [part for part in answer.split("\n\n") if part.strip()]
            number = max(1, len(parts) + rng.choice((0, 0, 0, 0, 1, -1)))
            nth = rng.randint(1, number)
            found = re.findall(r"\w+", parts[nth - 1]) if nth <= len(parts) else []
            first = found[0] if found and rng.random() < 0.8 else "note"
            return {"num_paragraphs": number, "nth_paragraph": nth, "first_word": rng.choice((first, first.upper(), first.lower()))}
        case "postscript":
            return {"postscript_marker": rng.choice(MARKS)}
        case "repeat_prompt":
            return {"prompt_to_repeat": rng.choice((PROMPT, f" {PROMPT}\n", PROMPT.lower()))}
        case "end_checker":
            return {"end_phrase": rng.choice((*PHRASES, " ".join(answer.split()[-2:]) or "The end."))}
        case _:
            return around(name, answer, {}, rng) if issubclass(INSTRUCTIONS[name], Counted) else {}


def around(name: str, answer: str, fields: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The fields with a relation, where there is one, and a number near what the answer has."""
    others = [field for field in INSTRUCTIONS[name].model_fields if field not in ("kind", "id", *fields)]
    relations = {field: rng.choice(("less than", "at least")) for field in others if field.endswith("relation")}
    (number,) = set(others) - set(relations)
    instruction = read_instruction({"kind": "instruction", "id": name, **fields, **relations, number: 1}, "case")
    assert isinstance(instruction, Counted)
    return {**fields, **relations, number: max(1, instruction.count(answer) + rng.choice((-2, -1, 0, 0, 1, 1, 2)))}


# Verdicts.


def judge(case: Case) -> list[bool]:
    """Our verdicts, `[strict, loose]`."""
    instruction = read_instruction({"kind": "instruction", "id": case.id, **case.fields}, "case")
    return [follows(instruction, case.answer), follows_loosely(instruction, case.answer)]


def ask(venv: Path, cases: Sequence[Case], environment: dict[str, str], *, seed: int | None) -> list[Any]:
    """Theirs, or the text of an error."""
    rows = [
        {"key": key, "prompt": "", "instruction_id_list": [case.id], "kwargs": [case.fields], "answer": case.answer}
        for key, case in enumerate(cases)
    ]
    command = [str(venv / "bin" / "python"), str(Path(__file__).parent / "lm_eval_ifeval.py")]
    done = subprocess.run(
        [*command, *([] if seed is None else ["--seed", str(seed)])],
        input="".join(json.dumps(row) + "\n" for row in rows),
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def write_punkt(folder: Path) -> str:
    """English `punkt_tab` as NLTK would download it, from the tables of `punkt`; returns the folder."""
    import punkt

    model = punkt.load_model("english")
    lines = {
        "abbrev_types.txt": sorted(model.abbrev_types),
        "sent_starters.txt": sorted(model.sent_starters),
        "collocations.tab": ["\t".join(pair) for pair in sorted(model.collocations)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in model.ortho_context.items()],
    }
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name, rows in lines.items():
        (english / name).write_text("\n".join(rows), encoding="utf-8")
    return str(folder)


def tabulate(cases: Sequence[Case], ours: Sequence[Any], theirs: Sequence[Any], again: Sequence[Any]) -> list[dict[str, Any]]:
    """One row for each instruction, and one for all."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*INSTRUCTIONS, "all")}
    for case, mine, verdict, repeated in zip(cases, ours, theirs, again, strict=True):
        for name in (case.id, "all"):
            counts[name].update(
                {
                    "cases": 1,
                    "strict": mine[0] == verdict[0],
                    "loose": mine[1] == verdict[1],
                    "passed_strict": verdict[0] is True,
                    "passed_loose": verdict[1] is True,
                    "unsteady": verdict != repeated,
                }
            )
    return [{"instruction": name, **counts[name]} for name in counts if counts[name]["cases"]]


COLUMNS = ("cases", "strict", "loose", "passed_strict", "passed_loose", "unsteady")


def print_table(table: Sequence[dict[str, Any]]) -> None:
    """`strict` and `loose`: cases with the same verdict; `passed`: by theirs; `unsteady`: theirs differ when langdetect draws anew."""
    for row in ({"instruction": "", **dict.fromkeys(COLUMNS, "")}, *table):
        print(f"{row['instruction']:<46}" + "".join(f"{row[name] if row['instruction'] else name:>15}" for name in COLUMNS))


if __name__ == "__main__":
    main()

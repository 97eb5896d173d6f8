"""Preflight: what a training stage is about to learn from, measured on the prepared data before any model is loaded.

Nothing is trained on that was not shown here: the figures go to `preflight.json`, five lines of them to the user, and one
that exceeds its limit ends the stage. Limits are shares, strict by default, and set under `preflight:` of the stage.
"""

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from posttrain import disk
from posttrain.batch import GlobalBatches, count_steps
from posttrain.error import UserError
from posttrain.ledger import PREFLIGHT_FILE
from posttrain.recipe import MOST_TOKENS, PreflightLimits
from posttrain.stage import StageContext

if TYPE_CHECKING:
    from posttrain.data.prepared import Prepared

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
STEPS_LOOKED_AT = 100
MOST_WEIGHT = 4 / 3
"""By how much all desirable answers together may outweigh the undesirable ones (Ethayarajh et al., 2024, eq. 8)."""


def fatal_faults(limits: PreflightLimits) -> list[Any]:
    """The faults of which not one row is allowed, so that the first one found can be said at once."""
    from posttrain.data.samples import Fault

    return [fault for fault in get_args(Fault) if getattr(limits, fault) == 0]


def preflight(context: StageContext[Any], tokenizer: Any) -> None:
    """Measure, write `preflight.json`, and raise `UserError` where a limit is exceeded. Reads the stage's prepared data."""
    from posttrain.data.prepared import read_prepared

    config, limits = context.config, context.config.preflight
    prepared = read_prepared(context)
    lengths = prepared.column("length")
    is_cut, is_unstopped = prepared.column("is_cut"), prepared.column("is_unstopped")
    labels, fingerprints = prepared.labels, prepared.column("fingerprint")
    repeats = _repeats(fingerprints if labels is None else np.bitwise_xor(fingerprints, labels))
    opposites = {} if labels is None else _opposites(fingerprints, labels)
    leaks = _leaks(context, prepared.column("question"))
    trained = prepared.num_trained_by_token()
    padding = _padding(context, prepared)

    num_read, num_rows = prepared.num_read, prepared.num_rows
    counts = {fault: prepared.left_out.get(fault, 0) for fault in ("refused", "untrained", "identical")}
    counts["over_max_length"] = prepared.left_out.get("over_max_length", 0) + int(is_cut.sum())
    counts["unstopped"] = int(is_unstopped.sum())
    counts["asked_otherwise"] = int(prepared.column("is_asked_otherwise").sum())
    counts["duplicates"] = len(repeats)
    counts["contradictory"] = len(opposites)
    counts["held_out"] = sum(len(rows) for rows in leaks.values())
    whole = dict.fromkeys(("refused", "untrained", "identical", "over_max_length"), num_read)
    shares = {name: count / whole.get(name, num_rows) for name, count in counts.items()}
    shares["padding"] = padding
    shares["untrained_vocabulary"] = float((trained == 0).mean())

    num_steps = config.max_steps or count_steps(num_rows, config.num_train_epochs, config.global_batch_size)
    found = {
        "data": context.input("data").name,
        "formats": prepared.formats,
        "num_rows_read": num_read,
        "num_rows_invalid": prepared.num_invalid,
        "num_rows": num_rows,
        "num_tokens": prepared.num_tokens,
        "num_trained_tokens": prepared.num_trained_tokens,
        "num_steps": num_steps,
        "length_quantiles": {f"{q:g}": int(np.quantile(lengths, q, method="higher")) for q in QUANTILES},
        "counts": counts,
        "shares": shares,
        "limits": limits.model_dump(),
        "held_out": {name: len(rows) for name, rows in leaks.items()},
        "stop_token": tokenizer.eos_token,
        "examples": {
            **prepared.examples,
            **({"invalid": prepared.first_invalid} if prepared.first_invalid else {}),
            **_examples(prepared.samples, is_cut, is_unstopped, repeats, opposites, leaks),
        },
    }
    if labels is not None:
        found["labels"] = {"desirable": int(labels.sum()), "undesirable": int((~labels).sum()), "num_pairs_split": prepared.num_pairs_split}
    exceeded = [name for name, share in shares.items() if share > getattr(limits, name)]
    found["exceeded"] = exceeded
    found["summary"] = _summary(context, found, trained)
    disk.write_json(context.directory / PREFLIGHT_FILE, found)
    if exceeded:
        raise UserError(_explain(context, found, exceeded[0]))
    if labels is not None and len(set(labels.tolist())) == 1:
        has, lacks = ("desirable", "false") if labels[0] else ("undesirable", "true")
        raise UserError(
            f"{context.at}: all {num_rows:,} answers of {found['data']} are {has}, and it learns from both kinds; "
            f"add some with label: {lacks}"
        )


def _repeats(fingerprints: npt.NDArray[np.uint64]) -> dict[int, int]:
    """Samples that are the same as an earlier one, to the first such."""
    _, first, inverse = np.unique(fingerprints, return_index=True, return_inverse=True)
    earliest = first[inverse]
    return {int(sample): int(earliest[sample]) for sample in np.flatnonzero(earliest != np.arange(len(earliest)))}


def _opposites(fingerprints: npt.NDArray[np.uint64], labels: npt.NDArray[np.bool_]) -> dict[int, int]:
    """Samples that bear one label while the same answer to the same prompt bears the other, to the first such."""
    first: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for sample, (fingerprint, label) in enumerate(zip(fingerprints.tolist(), labels.tolist(), strict=True)):
        first[label].setdefault(fingerprint, sample)
    both = first[0].keys() & first[1].keys()
    of_both = np.flatnonzero(np.isin(fingerprints, np.fromiter(both, dtype=np.uint64, count=len(both))))
    return {int(sample): first[not labels[sample]][int(fingerprints[sample])] for sample in of_both}


def _leaks(context: StageContext[Any], questions: npt.NDArray[np.uint64]) -> dict[str, dict[int, str]]:
    """Samples that ask what a row of an evaluation's data asks: of each data set, the sample and that row's place."""
    from posttrain.data.prepared import question_bits
    from posttrain.data.source import open_source

    leaks: dict[str, dict[int, str]] = {}
    taken: set[int] = set()
    for given in _measured_apart(context):
        rows = open_source(given.data, f"{context.at}: {given.name}").all_rows()
        asked: dict[int, str] = {}
        try:
            for row in rows:
                asked.setdefault(question_bits(row), row.origin)
        except UserError as error:
            # Left to the evaluation, this would be said when all is trained.
            raise UserError(
                f"{error} (in {given.name}, which is measured on later; `invalid_rows: drop` there leaves such rows out)"
            ) from None
        samples = np.flatnonzero(np.isin(questions, np.fromiter(asked, dtype=np.uint64, count=len(asked))))
        found = {int(sample): asked[int(questions[sample])] for sample in samples if int(sample) not in taken}
        taken |= found.keys()
        if found:
            leaks[given.name] = found
    return leaks


def _measured_apart(context: StageContext[Any]) -> list[Any]:
    """The data sets that evaluations measure on, but for those that the stage itself is wired to: that is no accident."""
    own = {given.name for given in context.inputs["data"]}
    return [given for given in context.held_out if given.name not in own]


def _padding(context: StageContext[Any], prepared: "Prepared") -> float:
    """Share of padding in the micro-batches of one rank, over the first steps; none but where the config asks for padded rows."""

    config = context.config
    if config.layout != "padded":
        return 0.0
    sizes = prepared.sizes("padded")
    num_steps = min(STEPS_LOOKED_AT, count_steps(len(sizes), 1, config.global_batch_size))
    batches = GlobalBatches(
        sizes,
        num_steps=num_steps,
        global_batch_size=config.global_batch_size,
        micro_batch_tokens=config.micro_batch_tokens or min(MOST_TOKENS.values()),
        seed=config.seed,
        rank=0,
        world_size=1,
    )
    useful = computed = 0
    for step in range(num_steps):
        for samples in batches.deal(step)[0]:
            held = sizes[samples]
            useful += int(held.computed.sum())
            computed += int(held.longest.max() * held.sequences.sum())
    return 1 - useful / computed


def _examples(
    data: Any,
    is_cut: npt.NDArray[Any],
    is_unstopped: npt.NDArray[Any],
    repeats: dict[int, int],
    opposites: dict[int, int],
    leaks: dict[str, dict[int, str]],
) -> dict[str, str]:
    """The first row of each kind that is trained on all the same."""
    found = {}
    for name, which in (("cut", is_cut), ("unstopped", is_unstopped)):
        if which.any():
            found[name] = f"{data[int(which.argmax())]['origin']}: is cut off"
    if repeats:
        sample, earlier = next(iter(repeats.items()))
        found["duplicates"] = f"{data[sample]['origin']}: is the same as {data[earlier]['origin']}"
    if opposites:
        sample, other = next(iter(opposites.items()))
        found["contradictory"] = f"{data[sample]['origin']} and {data[other]['origin']}"
    for name, rows in leaks.items():
        sample, place = next(iter(rows.items()))
        found["held_out"] = f"{data[sample]['origin']}: asks what {place} of {name} asks"
        break
    return found


def _summary(context: StageContext[Any], found: dict[str, Any], trained: npt.NDArray[np.int64]) -> list[str]:
    """Five lines that say what will be trained on, and one of labels where there are any."""
    config, counts, name = context.config, found["counts"], found["data"]
    invalid = found["num_rows_invalid"]
    quantiles = found["length_quantiles"]
    over = config.on_overflow
    left_out = {fault: counts[fault] for fault in ("refused", "untrained", "identical") if counts[fault]}
    what = ", ".join(f"{count:,} {fault}" for fault, count in left_out.items()) or "none refused"
    apart = [given.name for given in _measured_apart(context)]
    held_out = f"{counts['held_out']:,} asked in evaluation data ({', '.join(apart)})" if apart else "no evaluation data to compare with"
    if len(apart) < len(context.held_out):
        held_out += f"; {name} itself is measured on too"
    share = found["num_trained_tokens"] / found["num_tokens"]
    trains = f"{found['num_tokens']:,} tokens, {found['num_trained_tokens']:,} of them trained ({share:.0%})"
    ends = (
        f"every answer ends with {found['stop_token']}"
        + (f", but for {counts['unstopped']:,} cut off" if counts["unstopped"] else "")
        + f"; {int((trained > 0).sum()):,} of {len(trained):,} tokens of the vocabulary trained"
    )
    if not found["num_trained_tokens"]:  # only where answers are yet to be sampled
        trains, ends = f"{found['num_tokens']:,} tokens of prompts", f"answers are sampled, each up to {found['stop_token']}"
    return [
        f"{name}: {found['num_rows']:,} of {found['num_rows_read'] + invalid:,} rows; {'; '.join(found['formats'])}"
        + (f"; {invalid:,} do not fit: {found['examples']['invalid']}" if invalid else ""),
        f"{name}: {trains}; {found['num_steps']:,} steps of {config.global_batch_size:,} rows",
        f"{name}: length {quantiles['0']} to {quantiles['1']} tokens, median {quantiles['0.5']}, 95 % up to {quantiles['0.95']}; "
        f"{counts['over_max_length']:,} over max_length {config.max_length}"
        + (f" ({over})" if counts["over_max_length"] else "")
        + f"; {found['shares']['padding']:.0%} padding",
        f"{name}: {what}; {counts['duplicates']:,} duplicates; {held_out}",
        f"{name}: {ends}",
        *([f"{name}: {_balance(config, counts['contradictory'], **found['labels'])}"] if "labels" in found else []),
    ]


def _balance(config: Any, num_contradictory: int, *, desirable: int, undesirable: int, num_pairs_split: int) -> str:
    """How many answers bear each label, and whether their weights make up for it (Ethayarajh et al., 2024, eq. 8)."""
    said = f"{desirable:,} desirable answers ({desirable / (desirable + undesirable):.0%}) and {undesirable:,} undesirable ones"
    if num_pairs_split:
        said += f", converted from {num_pairs_split:,} pairs to {2 * num_pairs_split:,} rows"
    if num_contradictory:
        said += f"; {num_contradictory:,} bear both labels"
    if not desirable or not undesirable:
        return said
    odds, most = undesirable / desirable, MOST_WEIGHT
    ratio = config.desirable_weight / config.undesirable_weight / odds
    said += f"; together the desirable ones weigh {ratio:.2f} times as much"
    if 1 - 1e-9 <= ratio <= most + 1e-9:
        return said
    low, high = config.undesirable_weight * odds, config.desirable_weight / odds
    return (
        f"{said}, outside of 1 to {most:.2f}: set desirable_weight to {low:.3g} to {low * most:.3g}, "
        f"or undesirable_weight to {high / most:.3g} to {high:.3g}"
    )


_WORDS = {
    "over_max_length": "are over {at}.max_length; raise it",
    "unstopped": "have an answer that is cut before its stop token; raise {at}.max_length, or set {at}.on_overflow: drop",
    "asked_otherwise": "are asked for by the chat template in another way than it renders them, so generation would differ; "
    "set {at}.chat_template to one that renders both alike",
    "duplicates": "are the same as an earlier one; take them out, as the step exact_duplicates of curate does",
    "held_out": "ask what evaluation data ask ({names}); take them out, as the step contamination of curate does",
    "identical": "have two answers that are the same; take them out",
    "contradictory": "bear one label where the same answer bears the other; keep one of each",
    "refused": "cannot be rendered by the chat template; take them out",
    "untrained": "train no token; take them out",
}


def _explain(context: StageContext[Any], found: dict[str, Any], name: str) -> str:
    """One line: what exceeds its limit, by how much, where it is seen first, and what to do."""
    at, given = context.at, found["data"]
    share, limit = found["shares"][name], found["limits"][name]
    allow = f"or allow it with {at}.preflight.{name}"
    if name == "padding":
        return f"{at}: {share:.0%} of what a step computes is padding, over {limit:.0%}; set {at}.layout: auto, {allow}"
    if name == "untrained_vocabulary":
        return f"{at}: {share:.1%} of the vocabulary is never trained, over {limit:.1%}; add data, {allow}"
    count = found["counts"][name]
    example = found["examples"].get(name) or found["examples"].get("cut" if name == "over_max_length" else "", "")
    words = _WORDS[name].format(at=at, names=", ".join(found["held_out"]))
    seen = f" (the first: {example})" if example else ""
    return f"{at}: {count:,} rows of {given}, {share:.1%} and over {limit:.1%}, {words}, {allow}{seen}"

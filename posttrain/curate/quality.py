"""Quality: keeps the rows that a model finds best, by their difficulty or by their reward.

  quality:  IFD = L(answer | instruction) / L(answer),   L: mean over the answer's tokens of -log pi(token | all before it)
  reward:   the one number that a reward model gives to a whole conversation

IFD: Li et al., 2024, "From Quantity to Quality", arXiv 2308.12032. An instruction that helps little (IFD just below 1) leaves
most to learn; one that does not help at all (1 and above) does not belong to its answer.

Differences from Li et al.: 1. no model is trained beforehand to follow instructions: take the output of a short sft stage as
the policy where the base model cannot; 2. the answer by itself follows a BOS token, or where there is none a stop token, so
that its first token counts on both sides; 3. the stop token is part of the answer; 4. of several answers the last one counts,
and all turns before it are its instruction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from posttrain.curate.embed import open_policy
from posttrain.curate.scored import Scored, answered, measure_by_length
from posttrain.curate.step import Bench, Candidate, Drop, Outcome
from posttrain.curate.threads import each_batch
from posttrain.data.rows import Message, Pair, Row
from posttrain.error import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.curate.scored import Floats
    from posttrain.forward import Scorer
    from posttrain.reward import Reader

TOKENS_AT_ONCE = 2048
"""Tokens of one batch; logits exist only for the positions of answers."""


class Quality(Scored):
    """Keeps rows whose instruction helps with the answer, but not much: instruction-following difficulty (IFD)."""

    name: ClassVar[str] = "quality"
    reads: ClassVar[tuple[str, ...]] = ("policy",)

    max_length: int = Field(2048, ge=8)
    """Tokens of a row that are read; what is beyond does not count."""

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Drop what is misaligned, and keep the most difficult."""
        answers, problems = self._encode(candidates, bench)
        losses = self.losses(answers, bench)
        scores = [float(after / alone) if alone else math.nan for after, alone in losses]
        refused = {}
        for candidate, answer, score in zip(candidates, answers, scores, strict=True):
            if not answer.ids:
                reason, detail = problems.get(candidate.index, ("no room for the answer", f"{len(answer.before)} tokens before it"))
                refused[candidate.index] = Drop(candidate.index, f"{self.name}: {reason}", detail)
            elif not score < 1:
                refused[candidate.index] = Drop(candidate.index, f"{self.name}: instruction does not help", f"{score:.4f}")
        return self.choose(candidates, scores, refused, cut=sum(answer.is_cut for answer in answers))

    def losses(self, answers: "Sequence[Answer]", bench: Bench) -> "Floats":
        """Mean loss of each answer after its instruction and by itself, `(N, 2)`; 0 of an answer without tokens."""
        import numpy as np

        from posttrain.forward import Scorer

        loaded: list[Scorer] = []

        def compute(numbers: Sequence[int]) -> "Floats":
            if not loaded:
                model, tokenizer = open_policy(bench)
                longest = max(max(len(answer.before), len(answer.start)) + len(answer.ids) for answer in answers)
                loaded.append(Scorer(model, longest=longest, pad=tokenizer.pad_token_id))
            (scorer,) = loaded
            chunk = [answers[number] for number in numbers]
            after = mean_losses(scorer, [(answer.before, answer.ids) for answer in chunk])
            alone = mean_losses(scorer, [(answer.start, answer.ids) for answer in chunk])
            return np.stack([after, alone], axis=1)

        return measure_by_length(bench, self.name, [len(answer.before) + len(answer.ids) for answer in answers], compute)

    def _encode(self, candidates: Sequence[Candidate], bench: Bench) -> "tuple[list[Answer], dict[int, tuple[str, str]]]":
        """The answers as tokens, and by index why a row has none."""
        from posttrain.chat import encode
        from posttrain.models import load_tokenizer

        tokenizer, contract = load_tokenizer(bench.context.input("policy"), bench.context.at)
        start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
        answers, problems = [], {}
        for candidate in candidates:
            row, before, ids = candidate.row, [], []
            try:
                if messages := answered(row):
                    last: Message = {**messages[-1], "train": True}
                    whole = encode(tokenizer, [*messages[:-1], last], row.tools, contract.stop_tokens[0], row.origin, train_on="last")
                    first = whole.trained.index(True)
                    before, ids = whole.ids[:first], whole.ids[first : first + sum(whole.trained)]
                else:
                    problems[candidate.index] = ("no answer", "")
            except UserError as error:
                problems[candidate.index] = ("refused by the chat template", str(error))
            room = max(0, self.max_length - len(before))
            answers.append(Answer(start, before, ids[:room], len(ids) > room))
        return answers, problems


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids of an answer, of all that stands before it, and of what it begins after when it stands alone."""

    start: list[int]
    before: list[int]
    ids: list[int]
    is_cut: bool
    """Whether its end was over the length that is read."""


class Reward(Scored):
    """Keeps the rows that the reward model in `reward` scores highest."""

    name: ClassVar[str] = "reward"
    reads: ClassVar[tuple[str, ...]] = ("reward",)

    margin: float | None = Field(None, ge=0)
    """Drop a pair whose rejected answer scores higher than its chosen one by more than this; by default no pair for that."""
    max_length: int = Field(2048, ge=8)
    """Longest conversation that is scored, in tokens; a longer one is dropped, since its score would be that of a part."""

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Score every row, of a pair both answers."""
        from posttrain.reward import load_rewards, open_reader

        given, at = bench.context.input("reward"), bench.context.at
        model = load_rewards(given, at)
        ids, problems = _read(candidates, open_reader(given, at))
        both = self.scores(model, ids, bench)
        refused = {}
        for candidate, conversations, (chosen, rejected) in zip(candidates, ids, both, strict=True):
            if candidate.index in problems:
                detail = problems[candidate.index]
                refused[candidate.index] = Drop(candidate.index, f"{self.name}: refused by the chat template", detail)
            elif not conversations:
                refused[candidate.index] = Drop(candidate.index, f"{self.name}: no answer")
            elif math.isnan(chosen):
                refused[candidate.index] = Drop(candidate.index, f"{self.name}: over {self.max_length} tokens")
            elif self.margin is not None and rejected - chosen > self.margin:
                detail = f"rejected {rejected:.4g}, chosen {chosen:.4g}"
                refused[candidate.index] = Drop(candidate.index, f"{self.name}: rejected scores higher", detail)
        return self.choose(candidates, [float(chosen) for chosen, _ in both], refused)

    def scores(self, model: "PreTrainedModel", ids: Sequence[list[list[int]]], bench: Bench) -> "Floats":
        """Score of each conversation, or of a pair with its chosen and its rejected answer, `(N, 2)`; not a number: none."""
        import numpy as np

        from posttrain.reward import score_ids

        def compute(numbers: Sequence[int]) -> "Floats":
            scores = np.full((len(numbers), 2), np.nan, dtype=np.float32)
            fitting = [row for row, number in enumerate(numbers) if max(map(len, ids[number]), default=0) <= self.max_length]
            places = [(row, side) for row in fitting for side in range(len(ids[numbers[row]]))]
            rewards = score_ids(model, [ids[numbers[row]][side] for row, side in places])
            for place, reward in zip(places, rewards, strict=True):
                scores[place] = reward
            return scores

        return measure_by_length(bench, self.name, [sum(map(len, conversations)) for conversations in ids], compute)


def mean_losses(scorer: "Scorer", answers: Sequence[tuple[list[int], list[int]]]) -> "Floats":
    """Mean of -log pi over the tokens of each answer, given as what stands before it and its own tokens, `(N,)`; 0 of none."""
    import numpy as np

    from posttrain.layout import pair_group

    losses = np.zeros(len(answers), dtype=np.float32)
    there = [number for number, (_, ids) in enumerate(answers) if ids]
    groups = [pair_group(before, [ids]) for before, ids in (answers[number] for number in there)]

    def mean_loss(positions: list[int]) -> None:
        for position, (log_probs,) in zip(positions, scorer.score([groups[position] for position in positions]), strict=True):
            losses[there[position]] = -log_probs.mean(dtype=np.float64)

    each_batch(mean_loss, scorer.batches(groups, TOKENS_AT_ONCE))
    return losses


def _read(candidates: Sequence[Candidate], reader: "Reader") -> tuple[list[list[list[int]]], dict[int, str]]:
    """What the reward model reads of each row, as token ids, and by index why that cannot be rendered."""
    ids, problems = [], {}
    for candidate in candidates:
        row = candidate.row
        try:
            ids.append([reader.ids(messages, row.tools, row.origin) for messages in _sides(row)])
        except UserError as error:
            ids.append([])
            problems[candidate.index] = str(error)
    return ids, problems


def _sides(row: Row) -> list[list[Message]]:
    """What the reward model reads: the conversation up to its last answer, or the prompt of a pair with each of its answers."""
    if isinstance(row, Pair):
        return [[*row.prompt, *row.chosen], [*row.prompt, *row.rejected]]
    return [messages] if (messages := answered(row)) else []

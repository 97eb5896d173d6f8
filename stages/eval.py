"""Eval: what each policy can do on held-out data, and whether it is better than the first one, row by row.

Measured, as far as the data have what it takes (docs/evaluation.md):
  nll          -1/N * sum over the assistant's tokens of log pi(token | all before it)           (conversations)
  text nll     the same of plain text, per token and in bits per byte: what was forgotten        (plain text)
  token ECE    by how much the probability of the likeliest next token is off                    (conversations)
  preference   share of pairs with log pi(chosen) > log pi(rejected), the mean margin, and ECE   (preference pairs)
  <checker>    share of greedy answers that pass the checks their row carries                    (rows with `checks`)
  reward       mean reward of the answers, and how well the reward model tells pairs apart       (with a reward model)
  win rate     how often its answer beats that of the first policy, by a judge                   (with `judge`)
  tasks        scores of lm-evaluation-harness                                                   (with `tasks`; docs/harness.md)
  answers      length, those that do not stop, repetition, and drift into another language       (rows that are answered)
and the difference of each from the first policy on the very same rows: with an interval (of the bootstrap, or exact where rows pass
or do not), with p, corrected where there are many, and with the least difference that so many rows can show (docs/gates.md).

Reads: policies (one or more; the first is the baseline), data (held-out data sets; not needed with tasks), reward (a reward model).
Writes: report.
"""

from collections.abc import Collection
from typing import Annotated, ClassVar

from pydantic import Field

from posttrain.config import INPUT_FILE
from posttrain.engine import EngineExecution
from posttrain.error import UserError
from posttrain.judging import Judge, RewardJudge
from posttrain.stage import Role, Stage, StageConfig, StageContext
from posttrain.task_names import check_tasks

TASK_FIELDS = ("num_fewshot", "limit", "apply_chat_template", "batch_size")


class EvalExecution(EngineExecution):
    """Where policies are held while they are measured, and what generates their answers."""

    bears_identity: ClassVar[bool] = False

    ranks_per_policy: int | None = Field(None, ge=1)
    """Processes that hold a policy together, each a share of every layer; by default as few as have room for it, and one where it can."""


class EvalConfig(StageConfig, EvalExecution):
    """What is measured, and how sure it should be."""

    bears_identity: ClassVar[bool] = True

    max_length: int = Field(2048, ge=2)
    """Longest prompt and answer that is scored, in tokens; a longer row is left out, and counted. Plain text is scored in such windows."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest generated answer, in tokens."""
    num_shown: int = Field(8, ge=0)
    """Rows without checks that are answered as well, for people to read side by side in the report, and to see how answers end."""
    judge: Judge | None = Field(None, discriminator="kind")
    """Who compares each policy's answers with the first one's: `{kind: reward}`, or `{kind: endpoint}`, an OpenAI-compatible one."""
    tasks: Annotated[list[str], INPUT_FILE] = []
    """Tasks of lm-evaluation-harness, by name, or by the path of a task file, which ends in `.yaml`. The next four fields are its own."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples with their answers before each question of a task; by default as the task says."""
    limit: int | float | None = Field(None, gt=0)
    """Rows of each task, the first ones, or such a share of them where it is below 1; all by default."""
    apply_chat_template: bool | None = None
    """Whether tasks are asked as a user asks, in the chat template; by default each policy that has one of its own is."""
    batch_size: int = Field(16, ge=1)
    """Requests of a task that are computed at once."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Confidence of the intervals."""
    seed: int = Field(0, ge=0)
    """Seed of what the bootstrap and the tests draw."""

    def check(self, num_processes: int, at: str) -> None:
        """Refuse tasks that are unknown, settings of tasks without one, and ranks that cannot be divided among policies."""
        if num_processes % (self.ranks_per_policy or 1):
            raise UserError(
                f"{at}.ranks_per_policy: {num_processes} processes cannot be divided into groups of {self.ranks_per_policy}; "
                f"give a divisor of {num_processes}"
            )
        if self.use_vllm and (self.ranks_per_policy or 1) > 1:
            raise UserError(
                f"{at}.use_vllm: vLLM holds a policy on one rank, and ranks_per_policy: {self.ranks_per_policy} spreads it over several; "
                "leave one of the two out"
            )
        if self.tasks:
            check_tasks(self.tasks, f"{at}.tasks")
        elif idle := next((name for name in TASK_FIELDS if getattr(self, name) != type(self).model_fields[name].default), None):
            raise UserError(f"{at}.{idle}: has no effect without tasks; name some, or leave it out")

    def check_inputs(self, roles: Collection[str], at: str) -> None:
        """Refuse to measure nothing, and a judge that is not there."""
        if "data" not in roles and not self.tasks:
            raise UserError(f"{at}.inputs.data: missing; name a dataset, or tasks under {at}.tasks")
        if "data" not in roles and self.use_vllm:
            raise UserError(f"{at}.use_vllm: has no effect without inputs.data, as transformers answers tasks; leave it out")
        if isinstance(self.judge, RewardJudge) and "reward" not in roles:
            raise UserError(f"{at}.inputs.reward: missing, and the judge reads it; name a reward model, or set {at}.judge.kind to endpoint")


def prepare(context: StageContext[EvalConfig]) -> None:
    """Check that every policy renders every row, and that every check can be made; no model, no process group."""
    from posttrain import disk
    from posttrain.evaluate import answers_by_vllm, check_rewards, open_contracts, read_rows
    from posttrain.judging import check_judge
    from posttrain.ledger import PREFLIGHT_FILE

    rows = read_rows(context)
    if context.config.tasks:
        from posttrain.harness import try_tasks

        rows.summary.extend(try_tasks(context))
    check_judge(context, rows)
    disk.write_json(context.directory / PREFLIGHT_FILE, {"summary": rows.summary})
    contracts = open_contracts(context)
    for tokenizer, contract in contracts:
        rows.encode(tokenizer, contract, context.config.max_length, context.at)
    if rows.rows:
        answers_by_vllm(context, contracts)
    check_rewards(context, rows)


def run(context: StageContext[EvalConfig]) -> dict[str, float]:
    """Measure every policy on this rank's share of the rows; the main rank compares and writes the report."""
    from posttrain.evaluate import measure_policies, reward_answers
    from posttrain.judging import hold_duels

    evaluation = measure_policies(context)
    reward_answers(evaluation)
    hold_duels(evaluation)
    if context.config.tasks:
        from posttrain.harness import measure_tasks

        measure_tasks(evaluation)
    return evaluation.write() if context.is_main else {}


STAGE = Stage(
    kind="eval",
    config=EvalConfig,
    inputs={
        "policies": Role("policy", many=True),
        "data": Role("dataset", many=True, optional=True),
        "reward": Role("reward_model", optional=True),
    },
    output="report",
    prepare=prepare,
    run=run,
    version=4,
)

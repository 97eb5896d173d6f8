"""Sample: a policy answers prompts, a reward model ranks the answers, and what comes of it is a data set.

  pairs   the best answer against the worst: on-policy preferences for another round of DPO   (Xu et al., 2023, arXiv 2312.16682)
  best    the best answer: rejection sampling, for another round of SFT                        (Dong et al., 2023, arXiv 2304.06767)
  all     every answer that came to an end, once each

Reads: policy, data (prompts: conversations are answered anew at their last answer, pairs from their prompt), reward (a reward
model, of whatever family; `all` can do without).  Writes: dataset.  Each chunk of answers is kept when it is there, so a stage
that was cut off goes on with the chunk that it was at.
"""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.engine import EngineExecution
from posttrain.error import UserError
from posttrain.stage import Role, Stage, StageConfig, StageContext


class SampleConfig(StageConfig, EngineExecution):
    """How prompts are answered, and what is made of the answers."""

    bears_identity: ClassVar[bool] = True

    output: Literal["pairs", "best", "all"] = "pairs"
    """What a prompt gives: the best and the worst answer as a pair, the best one, or all that came to an end."""
    num_generations: int = Field(8, ge=1)
    """Answers to each prompt."""
    max_completion_length: int = Field(256, ge=1)
    """Longest answer, in tokens; one that is cut off there is never chosen."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Longest prompt, in tokens; a longer one is left out. By default what the policy can read before an answer."""
    temperature: float = Field(1.0, gt=0)
    """What logits are divided by before a token is drawn."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the fewest of the likeliest tokens that have this probability together."""
    top_k: int = Field(0, ge=0)
    """Draw from so many of the likeliest tokens; 0: from all."""
    min_margin: float = Field(0.0, ge=0)
    """Least difference of the rewards of a pair; one without any difference is never made."""
    seed: int = Field(0, ge=0)
    """Seed of what is drawn."""

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> "SampleConfig":
        if self.output != "all" and self.num_generations < 2:
            raise ValueError(f"num_generations: 1 answer leaves nothing to choose for output: {self.output}; ask for 2 or more")
        if self.output != "pairs" and self.min_margin:
            raise ValueError(f"min_margin: has no effect with output: {self.output}; leave it out")
        return self


def prepare(context: StageContext[SampleConfig]) -> None:
    """Check that the policy and the reward model can read every prompt; no model, no process group."""
    if context.config.output != "all" and "reward" not in context.inputs:
        raise UserError(f"{context.at}.inputs.reward: missing; output: {context.config.output} takes a reward model to rank answers by")

    from posttrain import disk
    from posttrain.ledger import PREFLIGHT_FILE
    from posttrain.models import check_weights, load_tokenizer
    from posttrain.sampling import answers_by_vllm, check_reader, read_prompts

    for role in ("policy", "reward"):
        for given in context.inputs.get(role, ()):
            check_weights(given, context.at)
    tokenizer, contract = load_tokenizer(context.input("policy"), context.at)
    found = read_prompts(context, tokenizer)
    if "reward" in context.inputs:
        check_reader(context, found.prompts)
    answers_by_vllm(context, found.prompts, contract)
    disk.write_json(context.directory / PREFLIGHT_FILE, {"summary": found.summary})


def run(context: StageContext[SampleConfig]) -> dict[str, float]:
    """Answer and rate this rank's share of the prompts; the main rank chooses and writes."""
    from posttrain.engine import engine_name
    from posttrain.evaluate import Kept, gather
    from posttrain.models import load_tokenizer
    from posttrain.sampling import answer_and_rate, answers_by_vllm, read_prompts, write_rows

    tokenizer, contract = load_tokenizer(context.input("policy"), context.at)
    found = read_prompts(context, tokenizer)
    is_vllm = answers_by_vllm(context, found.prompts, contract)
    mine = answer_and_rate(context, Kept(context), found.prompts, tokenizer, contract, is_vllm=is_vllm)
    results = gather(mine)
    return write_rows(context, found, results, engine=engine_name(is_vllm=is_vllm)) if context.is_main else {}


STAGE = Stage(
    kind="sample",
    config=SampleConfig,
    inputs={"policy": Role("policy"), "data": Role("dataset", many=True), "reward": Role("reward_model", optional=True)},
    output="dataset",
    prepare=prepare,
    run=run,
    version=2,
)

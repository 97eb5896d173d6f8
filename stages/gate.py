"""Gate: does a policy keep the limits that it is set, by what an evaluation measured? If not, nothing is built on it.

  min, max              its metric against a number
  max_rise, max_drop    how much worse than another policy's, on the very same rows, it may be; min_rise, min_drop: how much better it must

Without `confidence` the value decides. With it, a one-sided bound of the value has to keep the limit, so that a policy that does not
keep it passes with a probability of 1 - confidence at most, however many gates there are: all of them must pass.

Reads: reports (of one or more evaluations).  Writes: verdict.  How sure these bounds are, and what a failed gate stops: docs/gates.md.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config import Config, nearest
from posttrain.error import UserError
from posttrain.stage import Role, Stage, StageConfig, StageContext

LIMITS = ("min", "max", "max_rise", "max_drop", "min_rise", "min_drop")
ALONE = ("min", "max")


class Gate(Config):
    """One limit."""

    metric: str
    """Name of the metric, as the evaluation's table has it."""
    policy: str | None = None
    """Whose metric; by default that of the last policy of the evaluation."""
    vs: str | None = None
    """Policy of the same evaluation that it is compared with, row by row."""
    min: float | None = None
    """Least that the metric may be."""
    max: float | None = None
    """Most that it may be."""
    max_rise: float | None = Field(None, ge=0)
    """Most that it may be above that of `vs`."""
    max_drop: float | None = Field(None, ge=0)
    """Most that it may be below that of `vs`."""
    min_rise: float | None = Field(None, ge=0)
    """Least that it must be above that of `vs`."""
    min_drop: float | None = Field(None, ge=0)
    """Least that it must be below that of `vs`."""
    confidence: float | None = Field(None, gt=0.5, lt=1)
    """How sure it must be that the limit is kept, such as 0.95; by default the value decides."""

    @property
    def limit(self) -> tuple[str, float]:
        """Name of the limit, and where it lies."""
        ((name, at),) = ((name, at) for name in LIMITS if (at := getattr(self, name)) is not None)
        return name, at

    @model_validator(mode="after")
    def _one_limit(self) -> "Gate":
        given = [name for name in LIMITS if getattr(self, name) is not None]
        fitting = [name for name in LIMITS if (name in ALONE) == (self.vs is None)]
        if not given:
            raise ValueError(f"{self.metric!r} has no limit; set one of {', '.join(fitting)}")
        if len(given) > 1:
            raise ValueError(f"{given[1]}: stands beside {given[0]}; make two gates of them")
        if given[0] not in fitting:
            why = "compares with a policy that is not named; set vs" if self.vs is None else f"says nothing of vs: {self.vs}"
            raise ValueError(f"{given[0]}: {why}, or set one of {', '.join(fitting)}")
        return self


class GateConfig(StageConfig):
    """Which limits, and what follows where one is not kept."""

    num_processes: Literal[1] = 1
    """One process: nothing here takes long."""
    gates: list[Gate] = []
    """Limits, each such as `{metric: nll, policy: dpo, vs: sft, max_rise: 0.02, confidence: 0.95}`; all must be kept."""
    on_fail: Literal["stop", "warn"] = "stop"
    """Whether stages further down that build on a policy which failed are kept from starting, or the run goes on."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap."""


def judges(config: GateConfig, reports: Mapping[str, Sequence[str]], at: str) -> list[str]:
    """The policies that nothing builds on once their gate failed."""
    if not config.gates:
        raise UserError(f"{at}.gates: none listed; add at least one, such as {{metric: answers passed, min: 0.4}}")
    known = list(dict.fromkeys(policy for policies in reports.values() for policy in policies))
    judged = []
    for number, gate in enumerate(config.gates):
        here = f"{at}.gates.{number}"
        for name, policy in (("policy", gate.policy), ("vs", gate.vs)):
            if policy is not None and policy not in known:
                raise UserError(f"{here}.{name}: {policy!r} is in no report of {', '.join(reports)}; {nearest(policy, known)}")
        if gate.policy is None and len(reports) > 1:
            raise UserError(f"{here}.policy: missing; {len(reports)} reports are read, so name whose {gate.metric!r} is meant")
        policy = gate.policy or known[-1]
        if policy == gate.vs:
            raise UserError(f"{here}.vs: {policy!r} would be compared with itself; {nearest(policy, [p for p in known if p != policy])}")
        if not any({policy, gate.vs or policy} <= set(policies) for policies in reports.values()):
            raise UserError(f"{here}.vs: no report has both {policy!r} and {gate.vs!r}; evaluate them together")
        judged.append(policy)
    return judged if config.on_fail == "stop" else []


def prepare(context: StageContext[GateConfig]) -> None:
    """Check that all that the gates ask for was measured."""
    from posttrain.gating import judge

    judge(context)


def run(context: StageContext[GateConfig]) -> dict[str, float]:
    """Hold the limits against what was measured, and write the verdict."""
    from posttrain.gating import judge

    verdict = judge(context)
    verdict.write(context.output)
    return {"passed": len(verdict.gates) - len(verdict.failed), "failed": len(verdict.failed)}


STAGE = Stage(
    kind="gate",
    config=GateConfig,
    inputs={"reports": Role("report", many=True)},
    output="verdict",
    prepare=prepare,
    run=run,
    judges=judges,
)

"""Merge: several policies of one architecture made into one by arithmetic on their weights; nothing is trained.

  linear: a weighted mean   slerp: along the arc between two   ties, dare_linear, dare_ties: changes from a base, thinned out and added up

Reads: policies (two or more; the first gives the chat contract and the type of the weights), base (the policy that all were
trained from; ties and dare need it).  Writes: policy.  The formulas, their papers and what differs: `posttrain.merging`.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from posttrain.error import UserError
from posttrain.stage import Role, Stage, StageConfig, StageContext

if TYPE_CHECKING:
    from posttrain.merging import Method

SETTINGS: dict["Method", tuple[str, ...]] = {
    "linear": ("weights",),
    "slerp": ("t",),
    "ties": ("weights", "density", "scale"),
    "dare_linear": ("weights", "density", "scale", "seed"),
    "dare_ties": ("weights", "density", "scale", "seed"),
}
"""What can be set for each method."""


class MergeConfig(StageConfig):
    """How the weights of policies become one."""

    num_processes: Literal[1] = 1
    """One process: it reads and writes more than it computes."""
    method: Literal["linear", "slerp", "ties", "dare_linear", "dare_ties"] = "linear"
    """How: `linear`, `slerp` of two policies, or by their changes from a base: `ties`, `dare_linear`, `dare_ties`."""
    weights: list[float] | None = Field(None, min_length=1)
    """How much each policy counts, in the order of the inputs; divided by their sum. By default all count the same."""
    t: float = Field(0.5, ge=0, le=1)
    """Of slerp: how far to go from the first policy to the second."""
    density: float = Field(0.5, gt=0, le=1)
    """Of ties and dare: share of each policy's changes that is kept; the largest, or of dare any, scaled up for those dropped."""
    scale: float = Field(1.0, gt=0)
    """Of ties and dare: factor of the change that is added to the base."""
    seed: int = Field(0, ge=0)
    """Of dare: seed of what is dropped."""

    @property
    def uses_bf16(self) -> bool:
        """Whether it computes in bfloat16: never."""
        return False

    @model_validator(mode="after")
    def _all_settings_count(self) -> "MergeConfig":
        if self.weights is not None and min(self.weights) <= 0:
            raise ValueError(f"weights: {self.weights} must all be above 0; leave the policy out instead")
        for name in ("weights", "t", "density", "scale", "seed"):
            if name not in SETTINGS[self.method] and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: has no effect with method: {self.method}; leave it out")
        return self


def prepare(context: StageContext[MergeConfig]) -> None:
    """Check that the policies can be merged: by the method, and being of one kind; no weights are read."""
    config, at = context.config, context.at
    names = [given.name for given in context.inputs["policies"]]
    if len(names) < 2:
        raise UserError(f"{at}.inputs.policies: {names[0]} alone leaves nothing to merge; name two policies or more")
    if config.weights is not None and len(config.weights) != len(names):
        raise UserError(f"{at}.weights: {len(config.weights)} given for {len(names)} policies; give one for each")
    if config.method == "slerp" and len(names) > 2:
        raise UserError(f"{at}.inputs.policies: slerp goes from one policy to another, and {len(names)} are named; name two")
    needs_base = "density" in SETTINGS[config.method]
    if needs_base and "base" not in context.inputs:
        raise UserError(f"{at}.inputs.base: missing; {config.method} adds up changes, so name the policy that all were trained from")
    if not needs_base and "base" in context.inputs:
        raise UserError(f"{at}.inputs.base: has no effect with method: {config.method}; leave it out")

    from posttrain.merging import open_policies

    open_policies(context)


def run(context: StageContext[MergeConfig]) -> dict[str, float]:
    """Merge and publish; the main rank, should there be others."""
    from posttrain.merging import merge_policies

    return merge_policies(context) if context.is_main else {}


STAGE = Stage(
    kind="merge",
    config=MergeConfig,
    inputs={"policies": Role("policy", many=True), "base": Role("policy", optional=True)},
    output="policy",
    prepare=prepare,
    run=run,
)

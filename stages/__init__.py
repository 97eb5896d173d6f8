"""The table of stages: kind to module. A new stage is one new file here and one line below."""

STAGES = {
    "curate": "stages.curate",
    "sft": "stages.sft",
    "reward": "stages.reward",
    "dpo": "stages.dpo",
    "orpo": "stages.orpo",
    "kto": "stages.kto",
    "rlhf": "stages.rlhf",
    "merge": "stages.merge",
    "sample": "stages.sample",
    "eval": "stages.eval",
    "gate": "stages.gate",
}

"""The table of stages: kind to module. A new stage is one new file here and one line below."""

STAGES = {
    "sft": "stages.sft",
    "dpo": "stages.dpo",
    "eval": "stages.eval",
}

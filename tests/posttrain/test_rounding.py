"""What is published in a coarse type is not quite what was trained, and who runs a stage is told so."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pipeline
from posttrain.artifact import Artifact

DONE = Artifact("id", "policy", "f", {}, 1, {}, {}, {"handoff_logit_drift": 0.092}, "", Path("sft"))


def told(done: Artifact, save_dtype: str, capsys: pytest.CaptureFixture[str]) -> str:
    node: Any = SimpleNamespace(name="sft", config=SimpleNamespace(save_dtype=save_dtype))
    pipeline._tell_rounding(node, done, pipeline._console())
    return capsys.readouterr().out


def test_a_difference_that_can_be_seen_is_told_with_what_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(DONE, "auto", capsys)
    assert "logits differ by 0.092 of their spread" in out
    assert "stages.sft.save_dtype: float32" in out


def test_nothing_is_told_where_there_is_none_or_nothing_to_do_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(replace(DONE, metrics={"handoff_logit_drift": 0.02}), "auto", capsys) == ""
    assert told(replace(DONE, metrics={}), "auto", capsys) == "", "an evaluation publishes no weights"
    assert told(DONE, "float32", capsys) == ""

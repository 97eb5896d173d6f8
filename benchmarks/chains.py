"""What each way to align makes of the tiny base model that comes with the project, side by side, over several seeds.

  python benchmarks/chains.py [--seeds N] [--chain NAME ...] [--keep DIR] [--json FILE]

Each chain is a file `configs/tiny_*.yaml`, run by `posttrain run`; those of one seed share a root, so what they have in common is
built once. Of the last policy of each:

  answers passed       share of 480 held-out questions whose greedy answer passes its checks
  preference accuracy  share of 200 held-out pairs whose chosen answer is the likelier one
  reward               mean reward of an answer sampled to each of the questions, by the reward model of `tiny_rlhf`, the same for all
  KL                   divergence of those answers from the policy after SFT, in nats of an answer, by log pi - log ref; its mean
  seconds              of the run, with what other chains of that seed had built left out

Figures are means over seeds, with the interval in which, by Student's t, the mean of all seeds lies in 95 of 100 cases.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from measured import read_lines, run_measured
from scipy import stats

from posttrain.artifact import read_artifact
from posttrain.config import ModelSource, PipelineConfig, read_pipeline
from posttrain.recipe import TrainingConfig
from posttrain.stage import Input, load_stage

ROOT = Path(__file__).resolve().parent.parent
JUDGE = "rlhf"
"""The chain whose reward model rates all."""
FIGURES = ("answers passed", "preference accuracy", "reward", "KL", "seconds")
MAX_NEW_TOKENS = 24


def main() -> None:
    """Run the chains, measure their policies, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--chain", action="append", metavar="NAME", help="only this chain, such as orpo; repeatable")
    parser.add_argument("--keep", type=Path, help="directory of the runs, which are kept; by default one that is taken down")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    names = [path.stem.removeprefix("tiny_") for path in sorted((ROOT / "configs").glob("tiny_*.yaml"))]
    names.remove("gate")  # trains what `sft_dpo` does
    names = [JUDGE, *(name for name in names if name != JUDGE and (arguments.chain is None or name in arguments.chain))]
    with tempfile.TemporaryDirectory(prefix="posttrain-chains-") as scratch:
        root = arguments.keep or Path(scratch)
        found: dict[str, list[dict[str, float]]] = {}
        for seed in range(arguments.seeds):
            for name in names:
                for policy, figures in run_chain(name, seed, root / f"seed_{seed}").items():
                    found.setdefault(policy, []).append(figures)
                    print(f"seed {seed}: {policy}: {figures}", flush=True)
        for policy, runs in found.items():
            print(f"{policy:<24}" + "".join(f"  {name} {show([run[name] for run in runs if name in run])}" for name in FIGURES))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run_chain(name: str, seed: int, root: Path) -> dict[str, dict[str, float]]:
    """Run a chain, and measure the policies that its eval compares."""
    config = read_pipeline(ROOT / "configs" / f"tiny_{name}.yaml")
    root.mkdir(parents=True, exist_ok=True)
    seeds = [f"stages.{stage}.seed={seed}" for stage in config.stages if _is_training(config, stage)]
    command = [sys.executable, str(ROOT / "pipeline.py"), "run", str(ROOT / "configs" / f"tiny_{name}.yaml"), *seeds, "--root", str(root)]
    started = time.monotonic()
    run_measured(command, env={"HF_HUB_OFFLINE": "1"}, log=root / f"{name}.log")
    seconds = time.monotonic() - started
    report = read_artifact(root / config.run / "eval")
    assert report is not None, "a run that ends well has finished all its stages"
    metrics = report.metrics
    judge = root / "tiny-rlhf" / "reward" / "output"
    found = {}
    for policy in config.stages["eval"]["inputs"]["policies"]:
        figures = {figure: metrics[f"{policy}.{figure}"] for figure in FIGURES if f"{policy}.{figure}" in metrics}
        if policy != "base":
            sft = root / config.run / "sft" / "output"
            figures |= sample_and_rate(root / config.run / policy / "output", sft if sft.exists() else None, judge, seed)
        if policy == config.stages["eval"]["inputs"]["policies"][-1]:
            figures["seconds"] = seconds
        found[f"{name}: {policy}"] = figures
    return found


def _is_training(config: PipelineConfig, stage: str) -> bool:
    return issubclass(load_stage(config.stages[stage].get("kind", stage), stage).config, TrainingConfig)


def sample_and_rate(policy: Path, reference: Path | None, judge: Path, seed: int) -> dict[str, float]:
    """Reward of an answer to each held-out question, and its divergence from the reference, where there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.chat import encode_prompt, read_contract
    from posttrain.forward import Scorer
    from posttrain.generate import decode, sample_all
    from posttrain.layout import pair_group
    from posttrain.reward import load_rewards, open_reader, score_ids

    tokenizer, contract = AutoTokenizer.from_pretrained(policy), read_contract(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    assert contract is not None, "what a stage published has a chat contract"
    asked = [row["messages"][:-1] for row in read_lines(ROOT / "posttrain/quickstart/data/heldout.jsonl")]
    prompts = [encode_prompt(tokenizer, messages, None, "benchmark") for messages in asked]
    sampled = sample_all(
        model,
        tokenizer,
        contract,
        prompts,
        num_return_sequences=1,
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        seeds=[(seed, number) for number in range(len(prompts))],
    )
    answers = [each[0] for each in sampled]
    given = Input("judge", "reward_model", "", ModelSource(model=str(judge)))
    reader = open_reader(given, "benchmark")
    said = [decode(tokenizer, each.ids[:-1] if each.ended else each.ids) for each in answers]
    rated = [[*messages, {"role": "assistant", "content": text}] for messages, text in zip(asked, said, strict=True)]
    rewards = score_ids(load_rewards(given, "benchmark"), [reader.ids(messages, None, "benchmark") for messages in rated])
    figures = {"reward": sum(rewards) / len(rewards)}
    if reference is not None and reference != policy:
        frozen = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
        groups = [pair_group(prompt, [each.ids]) for prompt, each in zip(prompts, answers, strict=True)]
        known = Scorer(frozen, longest=max(group.longest for group in groups), pad=tokenizer.pad_token_id).score(groups)
        apart = [sum(each.log_probs) - float(branches[0].sum()) for each, branches in zip(answers, known, strict=True)]
        figures["KL"] = sum(apart) / len(apart)
    return figures


def show(values: Sequence[float]) -> str:
    """Mean, and half the width of its interval."""
    if not values:
        return "-"
    digits = 0 if max(values) > 20 else 3
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.{digits}f}"


if __name__ == "__main__":
    main()

"""TRL's experimental ORPO trainer with the flags that its commands have: it has no command of its own.

python benchmarks/trl_orpo.py --model_name_or_path DIR --dataset_name DIR --output_dir DIR [--FIELD VALUE ...]
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


def main() -> None:
    """Train as `trl dpo` does, with another trainer."""
    script, arguments, model = TrlParser((ScriptArguments, ORPOConfig, ModelConfig)).parse_args_and_config()
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=torch.float32),
        args=arguments,
        train_dataset=load_dataset(script.dataset_name, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path),
    )
    trainer.train()


if __name__ == "__main__":
    main()

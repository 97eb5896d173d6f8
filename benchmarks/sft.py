"""How fast SFT is, next to TRL's command line and LLaMA-Factory's, on the same model, tokens and global batches.

  python benchmarks/sft.py [--quick] [--steps N] [--runs N] [--model DIR] [--llamafactory VENV] [--tune] [--json FILE]

Speed is supervised tokens (those that the loss is of) by seconds from the beginning of the first step to the end of the last.
`ratio_default` is ours by `trl default`; `ratio_best` is ours by the fastest row of any peer. `--tune` adds every setting of the
peers that was tried, to find out again which are the best on another machine.
"""

from peers import FP32, KEEP_MEMORY, Contender, common_options, run_benchmark

from posttrain.config import DataSource


def main() -> None:
    """Measure all contenders in turn, print the table, and write the figures."""
    arguments = common_options(__doc__ or "").parse_args()
    sources = [DataSource.model_validate({"data": str(arguments.data / "llamafactory_demo" / "alpaca_en_demo.json")})]
    settings = {**FP32, "padding_free": True, "max_length": None}
    tried = [Contender("trl fp32 padding-free", "trl", "fp32", settings, KEEP_MEMORY)]
    run_benchmark("sft", sources, arguments, learning_rate=2e-5, tried=tried)


if __name__ == "__main__":
    main()

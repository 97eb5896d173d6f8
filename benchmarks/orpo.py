"""How fast ORPO is, next to TRL's experimental trainer, on the same model, tokens and global batches.

  python benchmarks/orpo.py [--quick] [--steps N] [--runs N] [--model DIR] [--tune] [--json FILE]

Speed is preference pairs by seconds from the beginning of the first step to the end of the last. TRL's loss is of the prompt too,
so what is compared step by step is the log of the odds ratio, which both sides take of the answers alone.
"""

from peers import common_options, pair_sources, run_benchmark


def main() -> None:
    """Measure all contenders in turn, print the table, and write the figures."""
    arguments = common_options(__doc__ or "").parse_args()
    run_benchmark("orpo", pair_sources(arguments.data), arguments, learning_rate=8e-6, tried=[])


if __name__ == "__main__":
    main()

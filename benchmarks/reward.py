"""How fast a reward model trains, next to TRL's command line, on the same model and head, tokens and global batches.

  python benchmarks/reward.py [--quick] [--steps N] [--runs N] [--model DIR] [--tune] [--json FILE]

Speed is preference pairs by seconds from the beginning of the first step to the end of the last. `ratio_default` is ours by
`trl default`; `ratio_best` is ours by the fastest row of TRL. `--tune` adds every setting of TRL that was tried.
"""

from peers import common_options, pair_sources, run_benchmark


def main() -> None:
    """Measure all contenders in turn, print the table, and write the figures."""
    arguments = common_options(__doc__ or "").parse_args()
    run_benchmark("reward", pair_sources(arguments.data), arguments, learning_rate=1e-5, tried=[])


if __name__ == "__main__":
    main()

"""How fast DPO is, next to TRL's command line and LLaMA-Factory's, on the same model, tokens and global batches.

  python benchmarks/dpo.py [--quick] [--steps N] [--runs N] [--model DIR] [--llamafactory VENV] [--tune] [--json FILE]

Speed is preference pairs by seconds from the beginning of the first step to the end of the last, and of the pass of the
reference over all pairs, where it is done before. `ratio_default` is ours by `trl default`; `ratio_best` is ours by the
fastest row of any peer. `--tune` adds every setting of the peers that was tried.
"""

from peers import FP32, KEEP_MEMORY, Contender, common_options, micro, pair_sources, run_benchmark


def main() -> None:
    """Measure all contenders in turn, print the table, and write the figures."""
    arguments = common_options(__doc__ or "").parse_args()
    settings = {**FP32, **micro(2), "precompute_ref_log_probs": True}
    tried = [Contender("trl fp32 reference before", "trl", "fp32", settings, KEEP_MEMORY, is_sorted=True)]
    run_benchmark("dpo", pair_sources(arguments.data), arguments, learning_rate=5e-7, tried=tried)


if __name__ == "__main__":
    main()

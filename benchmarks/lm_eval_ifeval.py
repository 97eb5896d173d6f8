"""The verdicts of lm-evaluation-harness on IFEval's instructions: rows on stdin, one `[strict, loose]` a line on stdout.

  VENV/bin/python benchmarks/lm_eval_ifeval.py [--seed N] < ROWS

Runs where `lm_eval[ifeval]` is installed, and imports nothing of ours. A row is one of IFEval's with a single instruction, and an
`answer`; where the harness fails on it, its error is the verdict. `--seed` fixes the draws of langdetect, which the harness does not.
"""

import argparse
import contextlib
import json
import logging
import random
import sys


def main() -> None:
    """Judge every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="seed of langdetect")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        import langdetect
        from lm_eval.tasks.ifeval.utils import process_results
    langdetect.DetectorFactory.seed = arguments.seed
    random.seed(0)
    for line in sys.stdin:
        row = json.loads(line)
        try:
            found = process_results(row, [row["answer"]])
        except Exception as error:  # whatever it is: the caller shows it
            print(json.dumps(f"{type(error).__name__}: {error}"))
            continue
        (strict,), (loose,) = found["inst_level_strict_acc"], found["inst_level_loose_acc"]
        print(json.dumps([bool(strict), bool(loose)]))


if __name__ == "__main__":
    main()

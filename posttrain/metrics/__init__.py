"""What is measured: answer checkers, likelihood metrics, and differences between policies with their intervals.

check.py        the checks that a row of data may carry, validated, and how each scores an answer; no torch, no evaluate
ifeval.py       the check `instruction`: the 25 verifiable instructions of IFEval
paired.py       bootstrap intervals of one policy's mean, and of the difference between two policies on the same rows
measured.py     what results by row amount to, and what their intervals are drawn from
metric.py       loads one of the `evaluate` modules shipped here
answers.py      what the `evaluate` modules of the answer checkers share
<name>/<name>.py    one `evaluate` module each; `evaluate.load` takes the folder as well
"""

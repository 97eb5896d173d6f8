"""What is measured: answer checkers, likelihood metrics, and differences between policies with their intervals.

check.py        the checks that a row of data may carry, validated, and how each scores an answer; no torch, no evaluate
ifeval.py       the check `instruction`: the 25 verifiable instructions of IFEval
refusals.py     the check `refusal`: whether an answer declines to do what was asked
generated.py    what any generated answer shows: whether it goes round
language.py     whether an answer is in another language than its question
calibration.py  by how much the probabilities of pairs are off
paired.py       bootstrap intervals of one policy's mean, and of the difference between two policies on the same rows
passed.py       the same of shares of passed rows, exact for few rows, and McNemar's test
duels.py        win rates of duels with another policy's answers, and such as length does not explain
evidence.py     p-values of differences, corrected where there are many, and what so many rows can show
measured.py     what results by row amount to, and what their intervals are drawn from
table.py        what an evaluation's table says of policies, with intervals, p-values and limits
metric.py       loads one of the `evaluate` modules shipped here
answers.py      what the `evaluate` modules of the answer checkers share
<name>/<name>.py    one `evaluate` module each; `evaluate.load` takes the folder as well
"""

"""Reports: what runs left on disk as one page that needs no network, or as a table for the terminal. Imports no torch.

read.py         a run's directory -> plain data
chain.py        the stages of a run in order, as lanes of a picture
curves.py       logged steps -> curves that belong in one chart, thinned
draw.py         a chart -> SVG, by matplotlib
page.py         plain data -> HTML; look.css page.css page.js *.html.j2 beside it
compare.py      several runs: settings that differ, differences with intervals, curves in one chart
serve.py        the page of a run that goes on, served to this machine alone
"""

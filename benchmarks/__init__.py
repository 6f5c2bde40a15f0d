"""Each prints a table and writes JSON and a plot into benchmarks/results/. Weights are random: they are about speed alone."""

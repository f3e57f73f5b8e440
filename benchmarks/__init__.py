"""Programs that measure, print the figures and write them to benchmarks/results/."""

"""Programs that print what was measured, and write it to benchmarks/results/."""

"""Scripts over the commands of `regionspot_cli`, and the benchmarks: `python -m tools.benchmarks` in the checkout."""

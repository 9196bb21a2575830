"""Benchmarks that run and print tables: `python -m benchmarks NAME`. Figures are ratios within one run."""

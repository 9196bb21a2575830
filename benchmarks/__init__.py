"""Benchmarks that run and print tables: `python -m benchmarks NAME`. Figures are ratios within one run.

A benchmark is a module with `add_options(parser)`, its own options, and `run(arguments)`, which yields a
`reporting.Row` for each thing measured. `arguments` also has `size`, `device` and `rounds`. It is named in
`__main__.BENCHMARKS`.
"""

"""For every option a case in which changing it changes what it should: one table per group of options.

A table is a module here with `EFFECTS`, by option name; `test_effects.py` reads them all and misses none.
"""

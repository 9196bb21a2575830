"""`python -m benchmarks NAME [options]`; each benchmark says its options with --help."""

import importlib
import sys

NAMES = ("lokr",)

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m benchmarks {{{','.join(NAMES)}}} [options]")
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])

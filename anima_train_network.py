"""The entry point under its older name; the same as examples/train_anima_lora.py.

accelerate launch anima_train_network.py --config_file train_args.toml --dataset_config dataset.toml
"""

import sys

from anima_peft.cli import report_faults
from anima_peft.commands.train import train_from

if __name__ == "__main__":
    sys.exit(report_faults(lambda: train_from(sys.argv[1:], prog="anima_train_network.py")))

"""Convert a configuration of the older one-file layout into train args and a dataset TOML.

python tools/convert_anima_root_to_kohya.py --input old_root.toml --output_dir converted
"""

import sys

from anima_peft.cli import report_faults
from anima_peft.commands.migrate import migrate_file

if __name__ == "__main__":
    sys.exit(report_faults(lambda: migrate_file(sys.argv[1:], prog="convert_anima_root_to_kohya.py")))

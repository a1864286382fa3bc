"""``tst preprocess`` as a file: see megatron_tst/commands/preprocess_data.py."""

import sys

from megatron_tst.commands.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())

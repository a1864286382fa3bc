"""``tst evaluate`` as a file: see megatron_tst/commands/evaluate.py."""

import sys

from megatron_tst.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())

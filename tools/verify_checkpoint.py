"""``tst verify`` as a file: see megatron_tst/commands/verify_checkpoint.py."""

import sys

from megatron_tst.commands.verify_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())

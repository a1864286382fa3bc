"""``tst generate`` as a file: see megatron_tst/commands/generate.py."""

import sys

from megatron_tst.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())

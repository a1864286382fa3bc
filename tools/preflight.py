"""``tst preflight`` as a file: see megatron_tst/commands/preflight.py."""

import sys

from megatron_tst.commands.preflight import main

if __name__ == "__main__":
    sys.exit(main())

"""``tst trace`` as a file: see megatron_tst/commands/trace_data.py."""

import sys

from megatron_tst.commands.trace_data import main

if __name__ == "__main__":
    sys.exit(main())

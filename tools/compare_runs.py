"""``tst compare`` as a file: see megatron_tst/commands/compare_runs.py."""

import sys

from megatron_tst.commands.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())

"""``tst study`` as a file: see megatron_tst/commands/run_study.py."""

import sys

from megatron_tst.commands.run_study import main

if __name__ == "__main__":
    sys.exit(main())

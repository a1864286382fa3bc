"""``tst plan`` as a file: see megatron_tst/commands/plan_run.py."""

import sys

from megatron_tst.commands.plan_run import main

if __name__ == "__main__":
    sys.exit(main())

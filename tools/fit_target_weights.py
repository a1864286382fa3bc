"""``tst fit-weights`` as a file: see megatron_tst/commands/fit_target_weights.py."""

import sys

from megatron_tst.commands.fit_target_weights import main

if __name__ == "__main__":
    sys.exit(main())

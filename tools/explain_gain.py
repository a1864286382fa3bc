"""``tst explain`` as a file: see megatron_tst/commands/explain_gain.py."""

import sys

from megatron_tst.commands.explain_gain import main

if __name__ == "__main__":
    sys.exit(main())

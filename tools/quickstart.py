"""``tst quickstart`` as a file: see megatron_tst/commands/quickstart.py."""

import sys

from megatron_tst.commands.quickstart import main

if __name__ == "__main__":
    sys.exit(main())

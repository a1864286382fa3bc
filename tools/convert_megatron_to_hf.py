"""``tst convert to-hf`` as a file: see megatron_tst/commands/convert_megatron_to_hf.py."""

import sys

from megatron_tst.commands.convert_megatron_to_hf import main

if __name__ == "__main__":
    sys.exit(main())

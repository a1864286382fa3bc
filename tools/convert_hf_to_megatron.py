"""``tst convert from-hf`` as a file: see megatron_tst/commands/convert_hf_to_megatron.py."""

import sys

from megatron_tst.commands.convert_hf_to_megatron import main

if __name__ == "__main__":
    sys.exit(main())

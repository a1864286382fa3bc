"""``tst stock-cache`` as a file: see megatron_tst/commands/write_stock_data_cache.py."""

import sys

from megatron_tst.commands.write_stock_data_cache import main

if __name__ == "__main__":
    sys.exit(main())

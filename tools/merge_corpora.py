"""``tst merge`` as a file: see megatron_tst/commands/merge_corpora.py."""

import sys

from megatron_tst.commands.merge_corpora import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m distsign`, the same as the command `distsign`."""

import sys

from distsign.cli import main

if __name__ == "__main__":
    sys.exit(main())

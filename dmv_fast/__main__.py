"""`python -m dmv_fast` is `dmv-fast`."""

import sys

from dmv_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m lowprec` is `lowprec`."""

import sys

from lowprec.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m twotower`, and with it `torchrun -m twotower`: the same as the `twotower` command."""

import sys

from twotower.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

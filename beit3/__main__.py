"""`python -m beit3`."""

import sys

if not __package__:
    sys.exit("use: python -m beit3")

from beit3.cli import main

main()

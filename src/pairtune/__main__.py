"""`python -m pairtune` and `accelerate launch -m pairtune` do what the command `pairtune` does."""

import sys

from pairtune.cli import main

sys.exit(main())

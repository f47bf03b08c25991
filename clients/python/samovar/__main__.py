"""`python -m samovar` is the command `samovar`."""

import sys

from samovar.cli import main

sys.exit(main())

"""Entry point of `python -m samovar`, which is the command `samovar`."""

import sys

from samovar.cli.main import main

sys.exit(main())

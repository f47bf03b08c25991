"""How each process of the server speaks to its operator."""

import logging
import sys


def configure(level: str) -> None:
    """Log to standard error from this level on."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(message)s",
        stream=sys.stderr,
    )
    # Its only news is of clients that left; what goes wrong in a call is logged by the interceptor.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)

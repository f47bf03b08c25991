"""Command line of the server: python -m server."""

import asyncio
import logging
import sys

from server import config, process
from server.app import App


async def _serve(settings: config.Config) -> None:
    await App(settings).run()


def main() -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        The exit status: 0 after an orderly stop, 1 if the server could not start or failed, 130 after a
        second SIGINT.
    """
    settings = config.parse()
    process.configure(settings.log_level)
    try:
        asyncio.run(_serve(settings))
    except (OSError, RuntimeError) as error:
        logging.getLogger("samovar").error("cannot serve: %s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Entry point of the command line: runs one command and turns errors into messages and exit codes."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType
from typing import NoReturn

from samovar.cli.arguments import UsageError
from samovar.cli.commands import COMMANDS
from samovar.cli.files import FileError
from samovar.cli.parser import build_parser
from samovar.client import Client
from samovar.errors import Overloaded, SamovarError, Unavailable

_USAGE_CODE = 2
_INTERRUPT_CODE = 128 + signal.SIGINT
# The status that a shell reports for a process that SIGPIPE ended. Windows has no SIGPIPE.
_BROKEN_PIPE_CODE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program name; those of the process by default.

    Returns:
        The exit code: 0 success, 1 failed call, 2 wrong usage, 141 standard output was closed by its reader.

    Raises:
        SystemExit: argparse printed the help or a usage error.
    """
    try:
        try:
            return _run(argv)
        finally:
            # Flush here: at interpreter exit a broken pipe could not be caught any more.
            sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE_CODE
    except OSError as error:
        code = _fail(f"cannot write to standard output: {error}")
    _discard_output()
    return code


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser(version("samovar")).parse_args(argv)
    try:
        with _exit_on_sigint(), Client(args.address, timeout=args.timeout) as client:
            COMMANDS[args.command](client, args)
    except BrokenPipeError:
        raise
    except (UsageError, FileError) as error:
        return _fail(f"{error}", code=_USAGE_CODE)
    except Unavailable as error:
        return _fail(f"{error}\nIs a server listening at {args.address}? Set another address with --address.")
    except Overloaded as error:
        retry = f"\nRetry in {error.retry_delay:g} s." if error.retry_delay else ""
        return _fail(f"{error}{retry}")
    except (SamovarError, OSError) as error:
        return _fail(f"{error}")
    return 0


@contextmanager
def _exit_on_sigint() -> Iterator[None]:
    """Exit the process on Ctrl-C. This closes the connection, and so the server cancels the call."""
    previous = signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    # A KeyboardInterrupt inside gRPC can leave its locks held, and then closing the channel blocks
    # (grpc/grpc issue 19973).
    os.write(sys.stderr.fileno(), b"\nsamovar: cancelled\n")
    os._exit(_INTERRUPT_CODE)


def _discard_output() -> None:
    """Connect the standard streams to the null device, so that flushing their buffers at exit succeeds."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.dup2(null, sys.stderr.fileno())
    os.close(null)


def _fail(message: str, code: int = 1) -> int:
    print(f"samovar: {message}", file=sys.stderr)
    return code

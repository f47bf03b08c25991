"""What a server is told: flags, with environment variables as their defaults.

Every flag --some-flag may be given as SAMOVAR_SOME_FLAG instead.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.runtime import RUNTIMES

EPILOG = """\
every flag may be given as an environment variable: --metrics-port as SAMOVAR_METRICS_PORT.

examples:
  python -m server --models models
  python -m server --models models --device cuda --formats torchscript,onnx
  SAMOVAR_HOST=0.0.0.0 python -m server
"""


@dataclass(frozen=True)
class Config:
    """Validated once, when the server starts."""

    models: Path = Path("models")
    host: str = "127.0.0.1"
    port: int = 8001
    metrics_port: int = 8002
    device: str = "auto"
    formats: tuple[str, ...] = tuple(RUNTIMES)
    threads: int = 1
    max_batch_rows: int = 64
    max_waiting_rows: int = 200_000
    max_rows_per_request: int = 100_000
    max_message_mib: int = 64
    max_concurrent_calls: int = 4096
    grace_seconds: float = 30.0
    log_level: str = "info"


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration that a command line and an environment ask for; exits with 2 when they are wrong."""
    parser = _parser()
    _use_environment(parser, environment)
    return Config(**vars(parser.parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve generative models over gRPC.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Config(threads=max(1, (os.cpu_count() or 1) - 1))

    def flag(name: str, kind: Any, text: str) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        shown = ",".join(default) if isinstance(default, tuple) else default
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {shown})")

    flag("models", Path, "directory of artifacts, as <name>/<version>/")
    flag("host", str, "address to listen on; 0.0.0.0 for every interface")
    flag("port", _at_least(0), "gRPC port; 0 for any free one")
    flag("metrics-port", _at_least(0), "Prometheus port; 0 for any free one")
    flag("device", str, "cpu, cuda, cuda:1, …; auto takes a GPU when there is one")
    flag("formats", _formats, "formats to load, the preferred one first")
    flag("threads", _at_least(1), "CPU threads of one graph call; leave a core to the network")
    flag("max-batch-rows", _at_least(1), "rows of a program that share a step")
    flag(
        "max-waiting-rows",
        _at_least(1),
        "rows that may wait in all; more are refused with RESOURCE_EXHAUSTED",
    )
    flag("max-rows-per-request", _at_least(1), "rows that one request may ask for")
    flag("max-message-mib", _at_least(1), "largest gRPC message, either way, in MiB")
    flag("max-concurrent-calls", _at_least(1), "calls in flight; more are refused with RESOURCE_EXHAUSTED")
    flag("grace-seconds", float, "time that calls in flight have to finish on SIGTERM")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: info)"
    )
    return parser


def _use_environment(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Strings become defaults: argparse converts and checks them like flags."""
    for action in parser._actions:
        value = environment.get(f"SAMOVAR_{action.dest.upper()}")
        if value is not None and action.dest != "help":
            action.default = value


def _at_least(minimum: int) -> Any:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {value}")
        return value

    return integer


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(text.split(","))
    if unknown := [name for name in formats if name not in RUNTIMES]:
        raise argparse.ArgumentTypeError(
            f"no runtime for {', '.join(unknown)}; there are {', '.join(RUNTIMES)}"
        )
    return formats

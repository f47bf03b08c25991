"""What a server is told: flags, with environment variables as their defaults.

Every flag --some-flag may be given as SAMOVAR_SOME_FLAG instead.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.core.spec import FORMATS

LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_ROWS = 2**32 - 1

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
    grpc_workers: int = 0
    device: str = "auto"
    formats: tuple[str, ...] = FORMATS
    intra_op_threads: int = 1
    cuda_graphs: bool = False
    max_batch_rows: int = 64
    drr_quantum_rows: int = 8
    max_queued_rows: int = 200_000
    max_buffered_mib: int = 1024
    max_rows_per_request: int = 100_000
    max_message_mib: int = 64
    max_concurrent_calls: int = 4096
    drain_timeout: float = 30.0
    log_level: str = "info"


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration that a command line and an environment ask for; exits with 2 when they are wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    return Config(**vars(_parser().parse_args([*_flags(environment), *given])))


def _flags(environment: Mapping[str, str]) -> list[str]:
    """Environment variables as flags, to come before those of the command line, which win."""
    names = [field.name for field in dataclasses.fields(Config)]
    values = {name: environment.get(f"SAMOVAR_{name.upper()}") for name in names}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve generative models over gRPC.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Config(intra_op_threads=max(1, (os.cpu_count() or 1) - 1))

    def flag(name: str, kind: Any, text: str) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        shown = _shown(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {shown})")

    flag("models", Path, "directory of artifacts, as <name>/<version>/")
    flag("host", str, "address to listen on; 0.0.0.0 for every interface")
    flag("port", _integer(0, 65_535), "gRPC port; 0 for any free one")
    flag("metrics-port", _integer(0, 65_535), "Prometheus port; 0 for any free one")
    flag(
        "grpc-workers",
        _integer(0, 64),
        "processes that speak gRPC on the one port for the engine in this one; 0 to speak it here",
    )
    flag("device", str, "cpu, cuda, cuda:1, …; auto takes a GPU when there is one")
    flag("formats", _formats, "formats to load, the preferred one first")
    flag("intra-op-threads", _integer(1, 1024), "CPU threads of one graph call; leave a core to the network")
    flag(
        "cuda-graphs",
        _on_or_off,
        "on replays the kernels of a TorchScript or torch.export step as one launch; a GPU only",
    )
    flag("max-batch-rows", _integer(1, 65_536), "rows of a program that share a step")
    flag(
        "max-queued-rows",
        _integer(1, MAX_ROWS),
        "rows that may wait in all; more are refused with RESOURCE_EXHAUSTED",
    )
    flag(
        "max-buffered-mib",
        _integer(1, 1 << 20),
        "MiB of inputs and unread answers that open requests may hold; more are refused",
    )
    flag(
        "drr-quantum-rows", _integer(1, 65_536), "rows that a request may place at each turn when others wait"
    )
    flag("max-rows-per-request", _integer(1, MAX_ROWS), "rows that one request may ask for")
    flag("max-message-mib", _integer(1, 2047), "largest gRPC message, either way, in MiB")
    flag(
        "max-concurrent-calls",
        _integer(1, MAX_ROWS),
        "calls in flight, at each front end; more are refused with RESOURCE_EXHAUSTED",
    )
    flag("drain-timeout", _seconds, "time that calls in flight have to finish on SIGTERM")
    flag("log-level", _log_level, f"one of {', '.join(LOG_LEVELS)}")
    return parser


def _shown(default: Any) -> Any:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(default) if isinstance(default, tuple) else default


def _on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
    return text == "on"


def _integer(low: int, high: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {value}")
        return value

    return integer


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text}")
    return value


def _log_level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(LOG_LEVELS)}, got {text!r}")
    return text


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in formats if name not in FORMATS]:
        raise argparse.ArgumentTypeError(
            f"no runtime for {', '.join(unknown)}; there are {', '.join(FORMATS)}"
        )
    return formats

"""Settings of a server: command-line flags, each with an environment variable.

The fields of `Config` declare both: `max_batch_rows` is --max-batch-rows and SAMOVAR_MAX_BATCH_ROWS. Flags
override the environment.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from server import __version__
from server.core.spec import FORMATS

PROGRAM = "python -m server"
MAX_ROWS = 2**32 - 1

EPILOG = f"""\b
Examples:
  {PROGRAM} --models models
  {PROGRAM} --models models --device cuda --formats torchscript,onnx
  SAMOVAR_HOST=0.0.0.0 {PROGRAM}
"""

# Old flags, accepted until the next release.
DEPRECATED_FLAGS = {
    "--front-ends": "--grpc-workers",
    "--threads": "--intra-op-threads",
    "--quantum-rows": "--drr-quantum-rows",
    "--max-waiting-rows": "--max-queued-rows",
    "--max-held-mib": "--max-buffered-mib",
    "--grace-seconds": "--drain-timeout",
}


class _Integer(click.IntRange):
    """An integer in a range."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"expected an integer from {self.min} to {self.max}, got {value!r}", param, ctx)


def seconds(text: str) -> float:
    """Parse a duration."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise click.BadParameter(f"expected a number of seconds, at least 0, got {text!r}")
    return value


def on_or_off(text: str) -> bool:
    """Parse a switch."""
    if text not in ("on", "off"):
        raise click.BadParameter(f"expected on or off, got {text!r}")
    return text == "on"


def format_list(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of formats, and drop duplicates."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in FORMATS]:
        raise click.BadParameter(f"unknown format {unknown[0]!r}; expected some of: {', '.join(FORMATS)}")
    return names


def _flag(type_: Any, help_: str) -> dict[str, Any]:
    """Return the metadata of a field of `Config`: the type (see `click.Option`) and help text of its flag."""
    return {"type": type_, "help": help_}


@dataclass(frozen=True)
class Config:
    """Settings of a server. The help texts of the fields document them; `parse` validates them."""

    models: Path = field(
        default=Path("models"),
        metadata=_flag(click.Path(path_type=Path), "Directory of artifacts: NAME/VERSION/ inside it."),
    )
    host: str = field(
        default="127.0.0.1", metadata=_flag(click.STRING, "Address to listen on; 0.0.0.0 for all interfaces.")
    )
    port: int = field(default=8001, metadata=_flag(_Integer(0, 65_535), "gRPC port; 0 for a free port."))
    metrics_port: int = field(
        default=8002, metadata=_flag(_Integer(0, 65_535), "Prometheus port; 0 for a free port.")
    )
    grpc_workers: int = field(
        default=0,
        metadata=_flag(
            _Integer(0, 64),
            "Worker processes that speak gRPC on the port; 0 to speak gRPC in the engine's process.",
        ),
    )
    device: str = field(
        default="auto",
        metadata=_flag(
            click.STRING, "Device of the graphs: cpu, cuda, cuda:1, ...; auto prefers a GPU to the CPU."
        ),
    )
    formats: tuple[str, ...] = field(
        default=FORMATS,
        metadata=_flag(format_list, "Formats to load, in order of preference, separated by commas."),
    )
    intra_op_threads: int = field(
        default=max(1, (os.cpu_count() or 1) - 1),
        metadata=_flag(
            _Integer(1, 1024), "CPU threads of one graph call. The default leaves one core to gRPC."
        ),
    )
    cuda_graphs: bool = field(
        default=True,
        metadata=_flag(
            on_or_off,
            "on: replay each step on a GPU as one CUDA graph, where this changes no bit; off: launch its "
            "kernels one by one.",
        ),
    )
    max_gpu_memory_mib: int = field(
        default=0,
        metadata=_flag(
            _Integer(0, 1 << 24),
            "Most MiB of GPU memory for PyTorch, and for each ONNX graph; 0 for all of it.",
        ),
    )
    max_batch_rows: int = field(
        default=64,
        metadata=_flag(_Integer(1, 65_536), "Largest number of rows of a program that share one step."),
    )
    drr_quantum_rows: int = field(
        default=8,
        metadata=_flag(
            _Integer(1, 65_536),
            "Quantum of deficit round robin: rows that a request may place in one round while others wait.",
        ),
    )
    max_queued_rows: int = field(
        default=200_000,
        metadata=_flag(
            _Integer(1, MAX_ROWS),
            "Largest number of queued rows of all requests; beyond it, RESOURCE_EXHAUSTED.",
        ),
    )
    max_buffered_mib: int = field(
        default=1024,
        metadata=_flag(
            _Integer(1, 1 << 20),
            "Most MiB of inputs and unread outputs of open requests; beyond it, RESOURCE_EXHAUSTED.",
        ),
    )
    max_rows_per_request: int = field(
        default=100_000, metadata=_flag(_Integer(1, MAX_ROWS), "Largest number of rows of one request.")
    )
    max_message_mib: int = field(
        default=64, metadata=_flag(_Integer(1, 2047), "Largest gRPC message in either direction, in MiB.")
    )
    max_concurrent_calls: int = field(
        default=4096,
        metadata=_flag(
            _Integer(1, MAX_ROWS),
            "Largest number of concurrent calls of each gRPC process; beyond it, RESOURCE_EXHAUSTED.",
        ),
    )
    drain_timeout: float = field(
        default=30.0, metadata=_flag(seconds, "Seconds that calls in flight have to finish after SIGTERM.")
    )
    log_level: str = field(
        default="info",
        metadata=_flag(click.Choice(["debug", "info", "warning", "error"]), "Lowest level of log messages."),
    )


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """Parse a command line and an environment.

    Args:
        arguments: the command line after the program's name (default: that of this process).
        environment: environment variables; those that name no setting are ignored.

    Returns:
        The validated settings.

    Raises:
        SystemExit: with status 2 and a message on standard error if a setting is invalid, and with status 0
            after --help and --version.
    """
    arguments = _rename_deprecated_flags(sys.argv[1:] if arguments is None else arguments)
    environment = _rename_deprecated_variables(environment)
    try:
        context = _command().make_context(PROGRAM, arguments, obj=environment)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    return Config(**context.params)


class _Option(click.Option):
    """An option that reads its variable from the environment given to `parse`."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value: str | None = ctx.obj.get(self.envvar)
        return value or None


def _command() -> click.Command:
    options = [
        _Option(
            [f"--{setting.name.replace('_', '-')}"],
            type=setting.metadata["type"],
            default=_to_text(setting.default),
            envvar=_variable(setting.name),
            help=setting.metadata["help"],
            show_default=True,
            show_envvar=True,
        )
        for setting in fields(Config)
    ]
    command = click.Command(
        PROGRAM,
        params=[*options],
        help="Serve generative models over gRPC.",
        epilog=EPILOG,
        context_settings={"max_content_width": 100},
    )
    return click.version_option(__version__, message="samovar server %(version)s")(command)


def _variable(name: str) -> str:
    return f"SAMOVAR_{name.strip('-').replace('-', '_').upper()}"


def _to_text(default: Any) -> str:
    """Return a default as it is written on a command line."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(default) if isinstance(default, tuple) else str(default)


def _rename_deprecated_flags(arguments: Sequence[str]) -> list[str]:
    renamed = []
    for argument in arguments:
        flag, *value = argument.split("=", 1)
        if flag in DEPRECATED_FLAGS:
            _warn_deprecated(flag, DEPRECATED_FLAGS[flag])
            flag = DEPRECATED_FLAGS[flag]
        renamed.append("=".join([flag, *value]))
    return renamed


def _rename_deprecated_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the new names; a variable with a new name overrides one with the old."""
    renamed = {}
    for old, new in ((_variable(old), _variable(new)) for old, new in DEPRECATED_FLAGS.items()):
        if old in environment:
            _warn_deprecated(old, new)
            renamed[new] = environment[old]
    return renamed | dict(environment)


def _warn_deprecated(old: str, new: str) -> None:
    click.echo(f"warning: {old} is deprecated and will be removed in the next release; use {new}", err=True)

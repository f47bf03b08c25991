"""Commands and options of the command line, with their help."""

import argparse
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from samovar._channel import DEFAULT_ADDRESS

_ROOT_EPILOG = """\
examples:
  samovar models                                      list the models
  samovar model NAME                                  show parameters, inputs, outputs and quality
  samovar sample NAME -n 64 --seed 7 -o grid.png      save 64 samples as a grid of images
  samovar complete NAME "Once" --tokens 200           continue a prompt
  samovar score NAME --input rows.npy                 print log-densities
  samovar reconstruct NAME --input rows.npy -o pairs.png

`samovar COMMAND --help` explains a command. --address and --timeout stand before COMMAND.

exit codes:
  0    success
  1    the server rejected the request, or the call failed
  2    wrong usage
  130  interrupted with Ctrl-C
  141  the reader of the output closed the pipe, as in `samovar models | head -1`
"""

_SUFFIX_CONTENTS = {
    ".npy": "main output",
    ".npz": "all outputs",
    ".png": "grid of images",
    ".txt": "one text per line",
    ".mid": "music; needs mido",
    ".csv": "one line per row",
}


@dataclass(frozen=True)
class _Transform:
    """A command that maps rows to rows, latents or numbers."""

    summary: str
    description: str
    examples: str
    suffixes: tuple[str, ...]


_TRANSFORMS = {
    "reconstruct": _Transform(
        "encode rows and decode them again",
        "Encode rows and decode them again. A .png shows each row above its reconstruction.",
        """\
  samovar reconstruct digits-vae --input rows.npy -o pairs.png
  samovar reconstruct digits-vae --input rows.npy --seed 7 -o rows.npy""",
        (".npy", ".npz", ".png"),
    ),
    "score": _Transform(
        "compute the log-densities of rows",
        "Compute the log-density of each row in nats, and in bits per dimension where it is defined. The "
        "first line says whether scores are exact, a lower bound, an estimate or unnormalized. `±` is one "
        "standard error.",
        """\
  samovar score digits-vae --input rows.npy
  samovar score digits-vae --input rows.npy --param draws=500 -o scores.csv""",
        (".npy", ".npz", ".csv"),
    ),
    "energy": _Transform(
        "compute the unnormalized energies of rows",
        "Compute the energy of each row, a number without unit. A lower energy means a more probable row. "
        "Compare energies within one model only.",
        """\
  samovar energy digits-ebm --input rows.npy
  samovar energy digits-ebm --input rows.npy -o energies.csv""",
        (".npy", ".npz", ".csv"),
    ),
    "encode": _Transform(
        "map rows to latents or features",
        "Map rows to latents or features. A .npz holds all outputs, for a VAE its mean and its spread.",
        """\
  samovar encode digits-vae --input rows.npy -o latents.npy
  samovar encode digits-vae --input rows.npy -o latents.npz""",
        (".npy", ".npz"),
    ),
    "decode": _Transform(
        "map latents to rows",
        "Map latents to rows.",
        """\
  samovar decode digits-vae --input latents.npy -o rows.png
  samovar decode digits-gan --input latent=latents.npy --input label=3 -o threes.npy""",
        (".npy", ".npz", ".png", ".txt", ".mid"),
    ),
    "classify": _Transform(
        "compute the class probabilities of rows",
        "Compute the class probabilities of rows. Without -o, print the most probable class of each row.",
        """\
  samovar classify digits-mlp --input rows.npy
  samovar classify digits-mlp --input rows.npy -o probabilities.npy""",
        (".npy", ".npz", ".csv"),
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose help fails on a closed pipe; that of argparse ignores it."""

    def print_help(self, file: Any = None) -> None:
        (file or sys.stdout).write(self.format_help())


Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def build_parser(version: str) -> argparse.ArgumentParser:
    """Return the parser; the attribute `command` of its result is the name of the command."""
    root = _Parser(
        prog="samovar",
        description="Sample, score, reconstruct, encode and decode with the models of a Samovar server.",
        epilog=_ROOT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"samovar {version}")
    root.add_argument(
        "--address",
        default=os.environ.get("SAMOVAR_ADDRESS", DEFAULT_ADDRESS),
        metavar="HOST:PORT",
        help="address of the server (default: %(default)s; set another default in SAMOVAR_ADDRESS)",
    )
    root.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="time limit of each call in seconds (default: none)"
    )
    _add_commands(root.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return root


def _add_commands(commands: Commands) -> None:
    _add_command(
        commands,
        "models",
        "list the models",
        "List the models that the server has loaded, with their formats, operations and quality. A star "
        "marks the default version of a model.",
        "  samovar models",
    )
    model = _add_command(
        commands,
        "model",
        "describe a model",
        "Describe a model: its operations, their parameters with defaults and bounds, inputs, outputs, and "
        "quality on held-out data.",
        """\
  samovar model digits-vae
  samovar model digits-vae --version 2""",
    )
    _add_model(model)
    _add_command(
        commands,
        "server",
        "describe the server and its limits",
        "Describe the server: versions, device, and the limits of requests.",
        """\
  samovar server
  samovar --address 10.0.0.5:8001 server""",
    )
    _add_sample(commands)
    _add_complete(commands)
    for name, transform in _TRANSFORMS.items():
        command = _add_command(commands, name, transform.summary, transform.description, transform.examples)
        _add_request(command)
        _add_output(command, transform.suffixes, is_required=".csv" not in transform.suffixes)


def _add_command(
    commands: Commands, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, width=80),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="NAME", help="name of the model; `samovar models` lists them")
    command.add_argument(
        "--version", default="", metavar="V", help="version of the model (default: the newest)"
    )
    command.add_argument(
        "--format",
        default="",
        help="format of the graphs: onnx, torchscript or torch_export (default: the server's choice)",
    )


def _add_request(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_sampling(command)
    command.add_argument(
        "--priority",
        choices=("interactive", "batch"),
        help="scheduling class (default: the server chooses by the number of rows)",
    )
    command.add_argument(
        "--first-row",
        type=_non_negative_int,
        default=0,
        metavar="I",
        help="index of the first row; a row depends on the seed and its index (default: 0)",
    )
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="[NAME=]VALUE",
        help="an input: FILE.npy, FILE.npz, or numbers such as point=0.5,1; `samovar model` lists the inputs",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed",
        type=_non_negative_int,
        help="random seed, 0 to 2^64 - 1; equal seeds give equal rows (default: random; printed)",
    )
    command.add_argument(
        "--variant",
        default="",
        metavar="V",
        help="variant of the operation, such as inpaint; `samovar model` lists them (default: no variant)",
    )
    # The former name of --variant, kept for one release.
    command.add_argument("--method", dest="variant", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    command.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of a parameter; `samovar model` lists parameters, defaults and bounds",
    )


def _add_sample(commands: Commands) -> None:
    command = _add_command(
        commands,
        "sample",
        "draw samples",
        "Draw samples and save them, or print them if they are text.",
        """\
  samovar sample digits-vae -n 64 --seed 7 -o grid.png
  samovar sample digits-diffusion -n 64 --param steps=50 -o rows.npz
  samovar sample digits-gan -n 10 --label 3 -o threes.npy
  samovar sample digits-vae --variant inpaint -n 4 --input image=rows.npy --input known=masks.npy -o rows.png
  samovar sample text-lstm -n 2""",
    )
    _add_request(command)
    command.add_argument(
        "-n", "--rows", type=_non_negative_int, default=1, metavar="N", help="number of rows (default: 1)"
    )
    command.add_argument(
        "--label",
        metavar="LABEL[,...]",
        help="class name or index, one for all rows or one per row; `samovar model` lists the classes",
    )
    command.add_argument(
        "--preview-every",
        type=_non_negative_int,
        default=0,
        metavar="K",
        help="write unfinished rows to FILE after every K steps (default: 0, finished rows only)",
    )
    _add_output(command, (".npy", ".npz", ".png", ".txt", ".mid"), is_required=False)


def _add_complete(commands: Commands) -> None:
    command = _add_command(
        commands,
        "complete",
        "continue a prompt and stream the output",
        "Continue a prompt and print the output while the model writes it. The seed goes to standard error.",
        """\
  samovar complete text-lstm "Once" --tokens 200 --param temperature=0.8
  samovar complete text-lstm "Once" --stop '\\n'
  samovar complete chorales-lstm --seed 7 -o chorale.mid""",
    )
    _add_model(command)
    command.add_argument("prompt", nargs="?", default="", help="beginning of the text (default: empty)")
    command.add_argument(
        "--tokens",
        type=_non_negative_int,
        metavar="N",
        help="maximum number of tokens to add (default: the model's)",
    )
    command.add_argument(
        "--stop",
        type=lambda token: token.replace(r"\n", "\n"),
        metavar="TOKEN",
        help=r"stop after this token; \n is a new line (default: none)",
    )
    _add_sampling(command)
    _add_output(command, (".txt", ".mid"), is_required=False)


def _add_output(command: argparse.ArgumentParser, suffixes: tuple[str, ...], is_required: bool) -> None:
    def output_path(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(
                f"{text}: expected a file name that ends in {', '.join(suffixes)}"
            )
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: no such directory: {path.parent}")
        return path

    contents = ", ".join(f"{suffix} ({_SUFFIX_CONTENTS[suffix]})" for suffix in suffixes)
    command.add_argument(
        "-o",
        "--output",
        type=output_path,
        metavar="FILE",
        required=is_required,
        help=f"output file; its suffix selects the format: {contents}",
    )


def _non_negative_int(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text}")
    return int(text)

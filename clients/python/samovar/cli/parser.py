"""The command line's words: every command and option, with its help. Runs nothing."""

import argparse
import os
from pathlib import Path
from typing import TypeAlias

from samovar._channel import DEFAULT_ADDRESS

_EXAMPLES = """\
examples:
  samovar models                                      what is served
  samovar model NAME                                  its parameters, inputs, outputs and quality
  samovar sample NAME -n 64 --seed 7 -o grid.png      64 samples as a picture
  samovar sample NAME -n 64 --param steps=50 -o rows.npz
  samovar sample NAME -n 10 --label 3 -o threes.npy
  samovar complete NAME "Once" --tokens 200 --param temperature=0.8
  samovar score NAME --input rows.npy                 log-densities, and what they are
  samovar reconstruct NAME --input rows.npy -o pairs.png

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted with Ctrl-C.
"""
_ENDINGS = {
    ".npy": "main output",
    ".npz": "all outputs",
    ".png": "picture",
    ".txt": "text",
    ".mid": "music",
    ".csv": "table",
}
_TRANSFORMS = {
    "reconstruct": ("send rows through the model and back", (".npy", ".npz", ".png")),
    "score": ("log-densities of rows, and what they are", (".npy", ".npz", ".csv")),
    "energy": ("unnormalised energies of rows", (".npy", ".npz", ".csv")),
    "encode": ("map rows to their latents or features", (".npy", ".npz")),
    "decode": ("map latents to rows", (".npy", ".npz", ".png", ".txt", ".mid")),
    "classify": ("class probabilities of rows", (".npy", ".npz", ".csv")),
}

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parser(version: str) -> argparse.ArgumentParser:
    """The parser; `command` of what it parses names the command."""
    root = argparse.ArgumentParser(
        prog="samovar",
        description="Sample, score, reconstruct, encode and decode with the models of a Samovar server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"samovar {version}")
    root.add_argument(
        "--address",
        default=os.environ.get("SAMOVAR_ADDRESS", DEFAULT_ADDRESS),
        metavar="HOST:PORT",
        help="the server (default: %(default)s; the variable SAMOVAR_ADDRESS changes it)",
    )
    root.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up on a call after so long (default: never)"
    )
    _add_commands(root.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return root


def _add_commands(commands: Commands) -> None:
    _command(commands, "models", "list what is served")
    _add_model(_command(commands, "model", "describe one model"))
    _command(commands, "server", "say what serves, and within which limits")
    _add_sample(_command(commands, "sample", "draw rows"))
    _add_complete(_command(commands, "complete", "go on with a text, and print it as it comes"))
    for name, (doc, endings) in _TRANSFORMS.items():
        command = _command(commands, name, doc)
        _add_request(command)
        _add_output(command, endings, required=".csv" not in endings)


def _command(commands: Commands, name: str, doc: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=doc, description=f"{doc[0].upper()}{doc[1:]}."
    )
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="NAME", help="the model's name, as `samovar models` lists it")
    command.add_argument(
        "--version", default="", metavar="V", help="one of its versions (default: the newest)"
    )
    command.add_argument("--format", default="", help="onnx or torchscript (default: the server's choice)")


def _add_request(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_settings(command)
    command.add_argument(
        "--priority", choices=("interactive", "batch"), help="who goes first (default: by the number of rows)"
    )
    command.add_argument(
        "--first-row", type=_count, default=0, metavar="I", help="index of the first row (default: 0)"
    )
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="[NAME=]VALUE",
        help="FILE.npy, FILE.npz, or numbers such as point=0.5,1; `samovar model` lists the inputs",
    )


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed", type=_count, help="same seed, same rows (default: drawn, and told afterwards)"
    )
    command.add_argument(
        "--method",
        default="",
        metavar="M",
        help="another way to do it, such as inpaint; `samovar model` lists them",
    )
    command.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter that differs from its default; `samovar model` lists them",
    )


def _add_sample(command: argparse.ArgumentParser) -> None:
    _add_request(command)
    command.add_argument(
        "-n", "--rows", type=_count, default=1, metavar="N", help="number of rows (default: 1)"
    )
    command.add_argument(
        "--label", metavar="LABEL[,...]", help="class of every row, or one for each; a name or a number"
    )
    command.add_argument(
        "--preview-every",
        type=_count,
        default=0,
        metavar="K",
        help="refresh FILE after each K steps of a row",
    )
    _add_output(command, (".npy", ".npz", ".png", ".txt", ".mid"), required=False)


def _add_complete(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("prompt", nargs="?", default="", help="what it begins with (default: nothing)")
    command.add_argument("--tokens", type=_count, metavar="N", help="how many to add at most")
    command.add_argument(
        "--stop",
        type=lambda word: word.replace(r"\n", "\n"),
        metavar="TOKEN",
        help=r"ends the text once it is drawn; \n is a new line",
    )
    _add_settings(command)
    _add_output(command, (".txt", ".mid"), required=False)


def _add_output(command: argparse.ArgumentParser, endings: tuple[str, ...], required: bool) -> None:
    def path(text: str) -> Path:
        given = Path(text)
        if given.suffix not in endings:
            raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in {', '.join(endings)}")
        if not given.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: there is no directory {given.parent}")
        return given

    listed = ", ".join(f"{_ENDINGS[ending]} ({ending})" for ending in endings)
    command.add_argument("-o", "--output", type=path, metavar="FILE", required=required, help=listed)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text}")
    return int(text)

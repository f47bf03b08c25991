"""The command line: python -m export COMMAND. Imports torch only for the commands that need it."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.families import FAMILIES

if TYPE_CHECKING:
    from export.data import Dataset

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# What `make serve` serves: model name, family and data set.
STARTERS = (("digits-vae", "vae", "digits"), ("digits-diffusion", "diffusion", "digits"))

_EPILOG = """\
examples:
  python -m export starter                    train the starter models that models/ lacks
  python -m export train vae                  train one model on 8x8 digits
  python -m export train diffusion --data-dir ~/mnist --preset full --device cuda
  python -m export verify models/digits-vae/1 prove that an artifact computes what was recorded
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    # Waiting threads that spin make everything crawl when cores are shared. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return command(options)
    except KeyboardInterrupt:
        print(
            "\nStopped. No artifact was left half written; run the same command to start again.",
            file=sys.stderr,
        )
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Train generative models and turn them into artifacts that the server runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_list(commands)
    _add_train(commands)
    _add_verify(commands)
    _add_starter(commands)
    return parser


def _add_list(commands: "_Commands") -> None:
    command = commands.add_parser("list", help="what can be trained, on what")
    command.set_defaults(command=_list)


def _add_train(commands: "_Commands") -> None:
    command = commands.add_parser(
        "train",
        help="train a family and write an artifact",
        description="Train, measure on held-out data, write models/NAME/VERSION and verify it.",
    )
    command.add_argument("family", choices=FAMILIES, help="what to train; python -m export list says more")
    command.add_argument("--data", default="digits", help="a data set by name (%(default)s)")
    command.add_argument("--data-dir", type=Path, help="a folder with train.parquet and test.parquet instead")
    command.add_argument(
        "--preset", choices=("starter", "full"), default="starter", help="size and patience (%(default)s)"
    )
    command.add_argument(
        "--format", choices=("onnx", "torchscript", "both"), default="both", help="graph files (%(default)s)"
    )
    command.add_argument("--name", help="the artifact's name; DATA-FAMILY when left out")
    command.add_argument("--version", help="a positive integer; the next free one when left out")
    command.add_argument("--steps", type=_positive, help="batches to train on; the preset's when left out")
    command.add_argument(
        "--seconds", type=_positive, help="stop training after so long; makes it irreproducible"
    )
    command.add_argument("--seed", type=int, default=0, help="of initialisation and training (%(default)s)")
    command.add_argument("--device", default="cpu", help="where to train, such as cuda (%(default)s)")
    _add_shared(command)
    command.set_defaults(command=_train)


def _add_verify(commands: "_Commands") -> None:
    command = commands.add_parser("verify", help="check an artifact's files and golden rows")
    command.add_argument("path", type=Path, help="such as models/digits-vae/1")
    command.set_defaults(command=_verify)


def _add_starter(commands: "_Commands") -> None:
    command = commands.add_parser(
        "starter",
        help="train the starter models that are missing",
    )
    _add_shared(command)
    command.set_defaults(command=_starter)


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--models", type=Path, default=Path("models"), help="the directory of artifacts (%(default)s)"
    )
    command.add_argument("--threads", type=_positive, help="CPU threads; torch decides when left out")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


def _list(options: argparse.Namespace) -> int:
    print("families")
    for name, entry in FAMILIES.items():
        print(f"  {name:<10} {entry.summary}\n  {'':<10} {', '.join(entry.operations)}")
    print("data sets\n  digits     8x8 handwritten digits, 17 levels, 1797 images; comes with scikit-learn")
    print("  moons      two half circles of points, 40,000 with noise; made by scikit-learn")
    print(
        "  --data-dir a folder with train.parquet and test.parquet (image: struct<bytes, path>, label: int64)"
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    from export import data

    dataset = data.load(options.data, options.data_dir)
    _make(options, options.family, dataset)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from export.verify import table, verify

    report = verify(options.path)
    print(table(report))
    for failure in report.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def _starter(options: argparse.Namespace) -> int:
    lacking = missing(options.models)
    for name in [name for name, *_ in STARTERS if name not in {lacks for lacks, *_ in lacking}]:
        print(f"{options.models / name} is there.")
    for number, (name, family, data_name) in enumerate(lacking, 1):
        from export import data

        print(f"[{number}/{len(lacking)}] {name}: {FAMILIES[family].summary}", flush=True)
        given = argparse.Namespace(**_TRAIN_DEFAULTS | vars(options) | {"name": name})
        _make(given, family, data.load(data_name))
    return 0


def missing(models: Path) -> list[tuple[str, str, str]]:
    """The starters of which a directory of artifacts has no version."""
    return [starter for starter in STARTERS if not _present(models / starter[0])]


_TRAIN_DEFAULTS = {
    "preset": "starter",
    "format": "both",
    "version": None,
    "steps": None,
    "seconds": None,
    "seed": 0,
    "device": "cpu",
}


def _present(directory: Path) -> bool:
    return directory.is_dir() and any(entry.name.isdecimal() for entry in directory.iterdir())


def _make(options: argparse.Namespace, family: str, dataset: "Dataset") -> None:
    import torch

    from export import recipe
    from export.graph import FORMATS

    if options.threads:
        torch.set_num_threads(options.threads)
    path = recipe.make(
        recipe.Recipe(
            family=FAMILIES[family].load(),
            data=dataset,
            models=options.models,
            preset=options.preset,
            formats=FORMATS if options.format == "both" else (options.format,),
            name=options.name,
            version=options.version,
            steps=options.steps,
            seconds=options.seconds,
            seed=options.seed,
            device=options.device,
        )
    )
    print(f"Wrote {path}")


if __name__ == "__main__":
    # Being told to stop is handled like Ctrl-C, so that nothing half written stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

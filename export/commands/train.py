"""python -m export train FAMILY: train one family and write an artifact."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands.options import add_command, add_training, positive_integer, positive_number
from export.families import FAMILIES
from export.graphs import formats

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Train a family, measure it on test rows, write the artifact MODELS/NAME/VERSION and verify it.

Ctrl-C saves a checkpoint after the current step; one is also saved every 20 seconds. Repeat the command to
resume. On a CPU, a resumed run ends with the same bits as an uninterrupted one, unless time ends the training
(--seconds, or a preset with a time limit). --no-resume starts over.

An artifact appears only when it is complete and verified."""

_EPILOG = """\
examples:
  python -m export train vae                       the default dataset of the family
  python -m export train realnvp --data moons      another dataset; python -m export list shows all
  python -m export train diffusion --data-dir ~/mnist --preset full --device cuda
"""


def add(commands: "Commands") -> None:
    """Add the command `train`."""
    parser = add_command(commands, "train", "train a family and write an artifact", _DESCRIPTION)
    parser.epilog = _EPILOG
    parser.add_argument("family", choices=FAMILIES, help="model family; python -m export list describes them")
    parser.add_argument("--data", metavar="NAME", help="dataset (default: the first one of the family)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="data folder instead: train.parquet and test.parquet, or input.txt",
    )
    parser.add_argument("--name", help="name of the artifact (default: DATA-FAMILY)")
    parser.add_argument("--version", metavar="N", help="version of the artifact (default: the next free one)")
    parser.add_argument(
        "--steps", type=positive_integer, metavar="N", help="training batches (default: from the preset)"
    )
    parser.add_argument(
        "--seconds",
        type=positive_integer,
        metavar="N",
        help="time limit of the training; makes the result irreproducible",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_number,
        metavar="RATE",
        help="initial learning rate (default: from the preset)",
    )
    parser.add_argument(
        "--threads",
        type=positive_integer,
        metavar="N",
        help="CPU threads; the last bits of the result depend on it (default: torch decides)",
    )
    add_training(parser)
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    datasets = FAMILIES[options.family].datasets
    dataset = options.data or datasets[0]
    if options.data_dir is None and dataset not in datasets:
        raise ValueError(
            f"--data: unknown dataset {dataset!r} for {options.family}; expected one of: "
            f"{', '.join(datasets)}, or a folder as --data-dir"
        )
    import torch

    from export import pipeline
    from export.datasets import loading

    if options.threads:
        torch.set_num_threads(options.threads)
    job = pipeline.TrainingJob(
        family=FAMILIES[options.family].load(),
        data=loading.load(dataset, options.data_dir),
        models=options.models,
        preset=options.preset,
        formats=formats.CHOICES[options.format],
        name=options.name,
        version=options.version,
        steps=options.steps,
        seconds=options.seconds,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=options.device,
        resume=options.resume,
    )
    path = pipeline.run(job, on_progress=lambda message: print(f"  {message}", flush=True))
    print(f"Wrote {path}")
    return 0

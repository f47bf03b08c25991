"""python -m export train FAMILY: one artifact."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands.options import add_training, command, positive, positive_number
from export.families import FAMILIES
from export.graphs import formats

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Train, measure on held-out data, write models/NAME/VERSION and verify it.

Ctrl-C stops after the step in hand and leaves a checkpoint beside the artifacts; one is made every 20 seconds
too. The same command then goes on. On a CPU it ends with the same bits as a run that was not interrupted, but
where time ends the training: with --seconds, and under presets with a limit of their own.
--fresh starts over. No artifact appears until it is complete and verified."""


def add(commands: "Commands") -> None:
    """The command `train`."""
    parser = command(commands, "train", "train a family and write an artifact", _DESCRIPTION)
    parser.add_argument("family", choices=FAMILIES, help="what to train; python -m export list says more")
    parser.add_argument("--data", help="a data set by name; the family's usual one when left out")
    parser.add_argument("--data-dir", type=Path, help="a folder with train.parquet and test.parquet instead")
    parser.add_argument("--name", help="the artifact's name; DATA-FAMILY when left out")
    parser.add_argument("--version", help="a positive integer; the next free one when left out")
    parser.add_argument("--steps", type=positive, help="batches to train on; the preset's when left out")
    parser.add_argument(
        "--seconds", type=positive, help="stop training after so long; makes it irreproducible"
    )
    parser.add_argument(
        "--learning-rate", type=positive_number, help="at the beginning; the preset's when left out"
    )
    parser.add_argument(
        "--threads", type=positive, help="CPU threads, on which the last bits depend; torch decides without"
    )
    add_training(parser)
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    data_name = options.data or FAMILIES[options.family].datasets[0]
    if options.data_dir is None:
        _check_suits(options.family, data_name)
    import torch

    from export import pipeline
    from export.datasets import loading

    if options.threads:
        torch.set_num_threads(options.threads)
    path = pipeline.run(
        pipeline.TrainingJob(
            family=FAMILIES[options.family].load(),
            data=loading.load(data_name, options.data_dir),
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
            fresh=options.fresh,
        )
    )
    print(f"Wrote {path}")
    return 0


def _check_suits(family: str, data: str) -> None:
    suited = FAMILIES[family].datasets
    if data not in suited:
        raise ValueError(
            f"expected one of {', '.join(suited)} as --data for {family}, or a folder as --data-dir; "
            f"got {data!r}"
        )

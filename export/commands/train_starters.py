"""python -m export train-starters: train the models that `make serve` serves."""

from typing import TYPE_CHECKING

from export.commands import jobs
from export.commands.options import add_command, add_models
from export.commands.train_all import add_parallel_jobs, train_missing

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = f"""\
Train the starter models that are missing: {" and ".join(jobs.STARTERS)}. This takes a few minutes on a CPU.
`make serve` runs this command. It is the same as: python -m export all {" ".join(jobs.STARTERS)}"""


def add(commands: "Commands") -> None:
    """Add the command `train-starters`."""
    parser = add_command(
        commands, "train-starters", "train the two starter models", _DESCRIPTION, old_name="starter"
    )
    add_models(parser)
    add_parallel_jobs(parser)
    parser.set_defaults(
        command=train_missing,
        names=jobs.STARTERS,
        preset="starter",
        format="both",
        seed=0,
        device="cpu",
        resume=True,
    )

"""An unfinished training run on disk: written atomically, and given back only to the run that it is of.

It lies in a directory beside the artifacts whose name starts with a dot: servers do not look there.
Knows no family and nothing of what a run's state is made of.
"""

import os
import pickle
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

State = dict[str, Any]

DIRECTORY = ".training"
SECONDS_BETWEEN = 20.0
_FILE = "checkpoint.pt"


class CheckpointError(ValueError):
    """A checkpoint that the run which found it must not go on from."""


class Checkpoint:
    """Where the training run of models/<name>/ is kept.

    `identity` is everything that a run's result depends on, by names that a person
    understands: another run may not go on from here.
    """

    def __init__(
        self, model: Path, identity: Mapping[str, str], seconds_between: float = SECONDS_BETWEEN
    ) -> None:
        self.path = model / DIRECTORY / _FILE
        self._identity, self._seconds_between = dict(identity), seconds_between
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed since it was last saved."""
        return time.monotonic() - self._saved >= self._seconds_between

    def load(self) -> State | None:
        """The state that was saved, on the CPU; None without one, CheckpointError for that of another run."""
        if not self.path.is_file():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            identity, state = saved["identity"], saved["state"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); --fresh starts over") from error
        if identity != self._identity:
            raise CheckpointError(
                f"{self.path} is of another run ({_differences(identity, self._identity)}); "
                "give the same settings to go on, another --name to keep both, or --fresh to start over"
            )
        return dict(state)

    def save(self, state: State) -> None:
        """Write the state of a run; whatever happens meanwhile, the file is the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}")
        try:
            with partial.open("wb") as file:
                torch.save({"identity": self._identity, "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Forget the run, because it is over or shall start over."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        with suppress(OSError):
            # Stays where artifacts are in it.
            self.path.parent.parent.rmdir()


def _differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    return ", ".join(
        f"{name}: {theirs.get(name, 'none')} there, {ours.get(name, 'none')} here" for name in names
    )

"""Checkpoints of unfinished training runs, written atomically and loaded only by the same run.

A checkpoint is in a hidden directory next to the versions of its model; servers ignore it.
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
SAVE_INTERVAL_SECONDS = 20.0
_FILE = "checkpoint.pt"


class CheckpointError(ValueError):
    """Raised for a checkpoint that is damaged or belongs to another run."""


class Checkpoint:
    """The checkpoint file of one training run.

    Args:
        model: The directory models/<name>.
        identity: All settings that the trained weights depend on, by readable names. A run with another
            identity cannot resume from this checkpoint.
        save_interval_seconds: Seconds between two saves.
    """

    def __init__(
        self, model: Path, identity: Mapping[str, str], save_interval_seconds: float = SAVE_INTERVAL_SECONDS
    ) -> None:
        self.path = model / DIRECTORY / _FILE
        self._identity, self._save_interval_seconds = dict(identity), save_interval_seconds
        self._last_save = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the save interval has passed since the last save."""
        return time.monotonic() - self._last_save >= self._save_interval_seconds

    def load(self) -> State | None:
        """Load the saved state onto the CPU; None if there is no checkpoint.

        Raises:
            CheckpointError: If the file is damaged, or belongs to another run.
        """
        if not self.path.is_file():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            identity, state = saved["identity"], saved["state"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path}: cannot read the checkpoint: {' '.join(str(error).split())}; "
                "start over with --no-resume"
            ) from error
        if identity != self._identity:
            raise CheckpointError(
                f"{self.path}: the checkpoint belongs to another run: "
                f"{_differences(identity, self._identity)}; repeat that run's settings to resume it, choose "
                "another --name to keep both, or start over with --no-resume"
            )
        return dict(state)

    def save(self, state: State) -> None:
        """Write the state of a run atomically: a failure leaves the previous checkpoint."""
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
        self._last_save = time.monotonic()

    def remove(self) -> None:
        """Delete the checkpoint, and the model's directory if it is empty."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        with suppress(OSError):
            # Fails, as intended, if the directory holds artifacts.
            self.path.parent.parent.rmdir()


def _differences(saved: Mapping[str, str], current: Mapping[str, str]) -> str:
    names = sorted(name for name in {*saved, *current} if saved.get(name) != current.get(name))
    return ", ".join(
        f"{name} is {saved.get(name, 'unset')} in the checkpoint and {current.get(name, 'unset')} now"
        for name in names
    )

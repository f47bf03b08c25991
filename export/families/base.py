"""What a family must provide. The exporter works with nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter
from export.datasets.loading import Dataset
from export.evaluation.figures import Drawing
from export.graphs.program import DataSpec, Input, Program, TensorSpec
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2


@dataclass(frozen=True)
class Preset:
    """A size of network and the training that suits it: `width` channels or units, `depth` layers.

    `judge` trains the classifier that samples are measured by, on `measured_rows` test rows; where
    a sample costs much, fewer `sampled_rows` are drawn, or none.
    `kinds` holds what suits other kinds of value than images better.
    """

    width: int
    depth: int
    training: Settings
    dropout: float = 0.0
    judge: Settings = field(default_factory=lambda: Settings(steps=500, validation_rows=1))
    measured_rows: int = 450
    sampled_rows: int | None = None
    kinds: Mapping[str, "Preset"] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """How many samples are compared with as many test rows; with 0, none are."""
        return self.measured_rows if self.sampled_rows is None else self.sampled_rows

    def suiting(self, value: DataSpec) -> "Preset":
        """This preset, or the one that it has for the value's kind."""
        return self.kinds.get(value.kind, self)


class Family(Protocol):
    """A kind of generative model: a network, its loss, and the programs that make it a service.

    `operations` names the programs, methods included: `sample`, `sample:inpaint`. `refusals` says
    why the model cannot truthfully have an operation, for those who ask for it.
    """

    name: str
    description: str
    operations: tuple[str, ...]
    unsupported_operations: Mapping[str, str]
    presets: Mapping[str, Preset]

    def network(self, data: Dataset, preset: Preset) -> Network:
        """An untrained network that fits the data."""

    def programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """The operations of a trained network."""

    def examples(self, data: Dataset) -> tuple[Example, ...]:
        """Requests whose answers the artifact carries: a few for every operation, some with parameters."""

    def quality(self, interpreter: Interpreter, data: Dataset, preset: Preset) -> list[manifest_pb2.Quality]:
        """Figures on test rows, measured by running the programs."""

    def panels(self, interpreter: Interpreter, data: Dataset) -> Sequence[Drawing]:
        """What the artifact's picture shows: real rows beside what the programs make."""


def label_input(value: DataSpec, absence: str) -> Input:
    """The class that a row is made or known to be of; the number of classes says that none is given."""
    classes = len(value.class_labels)
    doc = f"index of the class label; {classes} {absence}"
    return Input(TensorSpec("label", "int64", (), 0, classes, doc), optional=True, default=classes)

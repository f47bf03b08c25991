"""Interface between the exporter and a model family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter
from export.datasets.loading import Dataset
from export.evaluation.figures import Plot
from export.graphs.program import DataSpec, Input, Program, TensorSpec
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2


@dataclass(frozen=True)
class Preset:
    """Network size, training settings and size of the evaluation.

    Attributes:
        width: channels of a convolution or units of a layer.
        depth: number of layers or blocks.
        training: settings of the training loop.
        dropout: dropout probability.
        evaluator: training settings of the classifier whose features compare samples with test rows.
        evaluation_rows: test rows on which quality is measured.
        evaluation_samples: samples to compare with test rows; None for `evaluation_rows`, 0 for no
            comparison. Set it where sampling is slow.
        by_kind: presets that replace this one, by the kind of the data (`DataSpec.kind`).
    """

    width: int
    depth: int
    training: Settings
    dropout: float = 0.0
    evaluator: Settings = field(default_factory=lambda: Settings(steps=500, validation_rows=1))
    evaluation_rows: int = 450
    evaluation_samples: int | None = None
    by_kind: Mapping[str, "Preset"] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Number of samples to compare with as many test rows; 0 for no comparison."""
        return self.evaluation_rows if self.evaluation_samples is None else self.evaluation_samples

    def for_data(self, data_spec: DataSpec) -> "Preset":
        """Return the preset for the kind of the data: one of `by_kind`, or this preset."""
        return self.by_kind.get(data_spec.kind, self)


class Family(Protocol):
    """Model family: a network, its loss, and the programs that serve it.

    Attributes:
        name: key in `FAMILIES`.
        description: one sentence for the manifest.
        operations: names of the programs, variants included: `sample`, `sample:inpaint`.
        unsupported_operations: for each operation that the model cannot have, the reason. Clients that
            call the operation receive it.
        presets: presets by name: `tiny`, `starter`, `medium` and `full`.
    """

    name: str
    description: str
    operations: tuple[str, ...]
    unsupported_operations: Mapping[str, str]
    presets: Mapping[str, Preset]

    def build_network(self, data: Dataset, preset: Preset) -> Network:
        """Return an untrained network for the data.

        Raises:
            DataError: the family cannot model data of this kind or shape.
        """

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return the programs of a trained network, in the order of `operations`."""

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return the golden requests of an artifact: a few for each operation, some with parameters."""

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Run the programs and return quality figures on test rows, the main one first."""

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> Sequence[Plot]:
        """Return the panels of the artifact's picture: test rows and outputs of the programs."""


def label_input(data_spec: DataSpec, absence: str) -> Input:
    """Return the optional input `label`, int64 [B], which defaults to the number of classes.

    Args:
        data_spec: the data, with its class labels.
        absence: continues "<number of classes>, the default, ..." and says what the default does.
    """
    classes = len(data_spec.class_labels)
    doc = f"index of the class label; {classes}, the default, {absence}"
    return Input(TensorSpec("label", "int64", (), 0, classes, doc), optional=True, default=classes)

"""Runnable artifact with the test rows of its dataset, as the sections of a page use it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.artifacts.interpreter import Interpreter, Tensors, make_rows
from export.datasets.loading import Split
from export.report.snippets import required_inputs
from samovar.operations import program_name
from samovar.v1 import manifest_pb2

Rows = NDArray[Any]
Program = manifest_pb2.Program

IMAGE, VECTOR, TOKENS = (
    manifest_pb2.DataSpec.KIND_IMAGE,
    manifest_pb2.DataSpec.KIND_VECTOR,
    manifest_pb2.DataSpec.KIND_TOKENS,
)
SEED = 0
# Rows that a page shows, by the kind of the data.
NUM_ROWS = {IMAGE: 100, VECTOR: 2000, TOKENS: 3}
# Limits the memory of a run: a program may need a thousand numbers for each element of a row, for example to
# evaluate 256 levels for each of 10 classes.
_MAX_CHUNK_ELEMENTS = 15_000
# Limits of the axes, relative to the extent of the points.
_MARGIN = 1.1


@dataclass(frozen=True)
class LoadedArtifact:
    """Artifact with runnable graphs.

    Attributes:
        interpreter: runs the programs of the artifact.
        test: test rows of the dataset; None if the dataset is not available.
    """

    interpreter: Interpreter
    test: Split | None

    @property
    def data_spec(self) -> manifest_pb2.DataSpec:
        """Description of a row."""
        return self.interpreter.manifest.data_spec

    @cached_property
    def programs(self) -> Mapping[str, Program]:
        """Programs by name, for example `sample` and `sample:inpaint`."""
        return {
            program_name(program.operation, program.variant): program
            for program in self.interpreter.manifest.programs
        }

    @cached_property
    def samples(self) -> Rows | None:
        """Rows of the program `sample`; None if the program does not exist or requires inputs."""
        program = self.programs.get("sample")
        return self.sample("sample") if program and not required_inputs(program) else None

    @cached_property
    def shown_test(self) -> Split | None:
        """The test rows that the page shows, ordered by `select_by_class`; None without test rows."""
        return None if self.test is None else select_by_class(self.test, self.data_spec)

    @property
    def example_rows(self) -> Rows | None:
        """Rows to show and to transform: the shown test rows, or samples if there are no test rows."""
        return self.samples if self.shown_test is None else self.shown_test.rows

    @property
    def example_origin(self) -> str:
        """Description of `example_rows`."""
        return "samples (the dataset is not available)" if self.test is None else "test rows"

    @property
    def is_planar(self) -> bool:
        """Whether rows are points with at least two coordinates, of which the first two can be drawn."""
        shape = self.data_spec.tensor.shape
        return self.data_spec.kind == VECTOR and len(shape) == 1 < shape[0]

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Limits of both axes that contain nearly all points."""
        clouds = [rows[:, :2] for rows in (self.example_rows, self.samples) if rows is not None]
        extent = _MARGIN * max((float(np.quantile(abs(cloud), 0.999)) for cloud in clouds), default=3.0)
        return -extent, extent

    def brightness(self, images: Rows) -> NDArray[np.float64]:
        """Return images scaled to 0..1 by the bounds or the levels of the data spec."""
        spec, num_levels = self.data_spec.tensor, self.data_spec.num_levels
        low = spec.minimum if spec.HasField("minimum") else 0.0
        high = spec.maximum if spec.HasField("maximum") else max(num_levels - 1.0, 1.0)
        return np.clip((images.astype(np.float64) - low) / (high - low), 0, 1)

    def single_input(self, name: str) -> str:
        """Return the only required input of a program; "" without the program, or for 0 or 2 and more."""
        inputs = required_inputs(self.programs[name]) if name in self.programs else []
        return inputs[0] if len(inputs) == 1 else ""

    def takes_label(self, name: str) -> bool:
        """Return whether a program takes a class label."""
        has_input = any(spec.tensor.name == "label" for spec in self.programs[name].inputs)
        return has_input and bool(self.data_spec.class_labels)

    def sample(self, name: str) -> Rows:
        """Return the rows that the page shows of a program without required inputs.

        If the program takes a label, the labels are 0, 1, 2, ... again and again.
        """
        count = NUM_ROWS[self.data_spec.kind]
        labels = np.arange(count) % max(len(self.data_spec.class_labels), 1)
        return self.run(name, {"label": labels} if self.takes_label(name) else {}, count)

    def run(self, name: str, inputs: Mapping[str, Rows], count: int = 0) -> Rows:
        """Return the first output of a program, [N, *shape]; see `run_all`."""
        return next(iter(self.run_all(name, inputs, count).values()))

    def run_all(self, name: str, inputs: Mapping[str, Rows], count: int = 0) -> Tensors:
        """Run a program with seed SEED and default parameters.

        Args:
            name: program name.
            inputs: arrays [N, *shape] by name.
            count: number of rows, required if there are no inputs.

        Returns:
            All outputs by name, [N, *shape].
        """
        count = count or len(next(iter(inputs.values())))
        rows = make_rows(self.programs[name], SEED, range(count), inputs=inputs)
        size = max(1, _MAX_CHUNK_ELEMENTS // math.prod(self.data_spec.tensor.shape))
        chunks = [self.interpreter.run(name, rows[start : start + size]) for start in range(0, count, size)]
        return {output: np.concatenate([chunk[output] for chunk in chunks]) for output in chunks[0]}


def select_by_class(split: Split, data_spec: manifest_pb2.DataSpec) -> Split:
    """Return the first rows to show; for images with classes, one row of each class again and again.

    It stops when a class has no more rows. Classes without rows are left out.
    """
    count = NUM_ROWS[data_spec.kind]
    if data_spec.kind != IMAGE or not data_spec.class_labels:
        return split[:count]
    rows_by_class = [np.flatnonzero(split.labels == label) for label in np.unique(split.labels)]
    shortest = min(map(len, rows_by_class))
    interleaved = np.stack([rows[:shortest] for rows in rows_by_class], 1).reshape(-1)
    return split[interleaved[:count]]

"""From a family and a data set to an artifact: train, measure, write. Knows no family."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from google.protobuf import timestamp_pb2

from export.artifacts import writer
from export.artifacts.interpreter import eager_interpreter
from export.artifacts.reader import sha256
from export.datasets.loading import Dataset
from export.evaluation import formatting
from export.evaluation.figures import draw
from export.families.base import Family, Preset
from export.graphs import formats
from export.graphs.program import Program
from export.training import trainer
from export.training.checkpoint import Checkpoint
from samovar.v1 import manifest_pb2

SAMPLES_IMAGE = "samples.png"
CURVE_FILE = "training.json"
_NOT_OF_THE_NETWORK = ("training", "evaluator", "evaluation_rows", "evaluation_samples", "by_kind")
_UNTRAINED = trainer.TrainingResult(seconds=0, best=trainer.CurvePoint(0, math.nan, math.nan), curve=())
_LIBRARIES = ("samovar-applications", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class TrainingJob:
    """What to make. Settings that are None are the preset's; `fresh` forgets a run that was interrupted."""

    family: Family
    data: Dataset
    models: Path
    preset: str = "starter"
    formats: tuple[str, ...] = formats.DEFAULT_FORMATS
    name: str | None = None
    version: str | None = None
    steps: int | None = None
    seconds: float | None = None
    learning_rate: float | None = None
    seed: int = 0
    device: str = "cpu"
    fresh: bool = False

    @property
    def model_name(self) -> str:
        """The artifact's name: data set and family unless one is given."""
        return self.name or f"{self.data.name}-{self.family.name}"

    @property
    def suited_preset(self) -> Preset:
        """The preset that suits the data."""
        return self.family.presets[self.preset].for_data(self.data.spec)

    @property
    def training_settings(self) -> trainer.Settings:
        """The preset's settings with those that were given."""
        preset = self.suited_preset.training
        return dataclasses.replace(
            preset,
            steps=self.steps or preset.steps,
            seconds=self.seconds or preset.seconds,
            learning_rate=self.learning_rate or preset.learning_rate,
            seed=self.seed,
            device=self.device,
        )


def run(recipe: TrainingJob) -> Path:
    """Train, measure and write an artifact; returns its directory. ArtifactError when it cannot be.

    A run of the same recipe that was interrupted goes on; CheckpointError when it was of another.
    TrainingError when its loss is no number; then nothing is left behind.
    """
    writer.resolve_destination(recipe.models, recipe.model_name, recipe.version)
    torch.manual_seed(recipe.seed)
    network = recipe.family.build_network(recipe.data, recipe.suited_preset)
    checkpoint = Checkpoint(recipe.models / recipe.model_name, _identity(recipe, network))
    if recipe.fresh:
        checkpoint.remove()
    outcome = trainer.fit(network, recipe.data, recipe.training_settings, checkpoint=checkpoint)
    model = _measured(recipe, _model(recipe, outcome, network))
    model = dataclasses.replace(model, attachments={**model.attachments, CURVE_FILE: _curve(outcome)})
    print("  writing and verifying the graphs ...", flush=True)
    path = writer.write(model, recipe.models, recipe.version, recipe.formats)
    checkpoint.remove()
    return path


def _identity(recipe: TrainingJob, network: trainer.Network) -> dict[str, str]:
    """All that the trained weights depend on."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
    size = {
        name: value for name, value in vars(recipe.suited_preset).items() if name not in _NOT_OF_THE_NETWORK
    }
    known = {
        "family": recipe.family.name,
        "data": recipe.data.sha256,
        "torch": torch.__version__,
        "network": sha256(repr(shapes).encode())[:12],
        **size,
        **dataclasses.asdict(recipe.training_settings),
    }
    return {name: str(value) for name, value in known.items()}


def _curve(outcome: trainer.TrainingResult) -> bytes:
    points = [dataclasses.asdict(point) for point in outcome.curve]
    return (json.dumps({"curve": points, "best_step": outcome.best.step}, indent=1) + "\n").encode()


def export_untrained(recipe: TrainingJob) -> Path:
    """Write an artifact with random weights, unmeasured: quick, for tests of everything around it."""
    torch.manual_seed(recipe.seed)
    network = recipe.family.build_network(recipe.data, recipe.suited_preset)
    network.requires_grad_(False)
    for weights in network.parameters():
        # Layers that begin as zeros would hide what goes wrong before them.
        weights.add_(0.05 * torch.randn_like(weights))
    model = _model(recipe, _UNTRAINED, network)
    return writer.write(model, recipe.models, recipe.version, recipe.formats)


def _model(recipe: TrainingJob, outcome: trainer.TrainingResult, network: trainer.Network) -> writer.Model:
    return writer.Model(
        name=recipe.model_name,
        family=recipe.family.name,
        description=recipe.family.description,
        data_spec=recipe.data.spec,
        programs=tuple(map(_evaluating, recipe.family.build_programs(network, recipe.data))),
        examples=recipe.family.build_examples(recipe.data),
        provenance=_provenance(recipe, outcome),
        unsupported_operations=recipe.family.unsupported_operations,
    )


def _measured(recipe: TrainingJob, model: writer.Model) -> writer.Model:
    interpreter, family = eager_interpreter(model.data_spec, model.programs), recipe.family
    figures = family.measure_quality(interpreter, recipe.data, recipe.suited_preset)
    for figure in figures:
        print(f"  {formatting.line(figure)}")
    caption = "\n".join(map(formatting.line, figures))
    picture = draw(
        model.name, caption, family.build_panels(interpreter, recipe.data), model.data_spec.num_levels
    )
    return dataclasses.replace(model, quality=tuple(figures), attachments={SAMPLES_IMAGE: picture})


def _evaluating(program: Program) -> Program:
    for _, module, _ in program.modules:
        module.eval()
    return program


def _provenance(recipe: TrainingJob, outcome: trainer.TrainingResult) -> manifest_pb2.Provenance:
    settings = {
        "preset": recipe.preset,
        "best_step": outcome.best.step,
        "threads": torch.get_num_threads(),
        **dataclasses.asdict(recipe.training_settings),
    }
    return manifest_pb2.Provenance(
        created=timestamp_pb2.Timestamp(seconds=int(time.time())),
        dataset=recipe.data.name,
        dataset_sha256=recipe.data.sha256,
        seed=recipe.seed,
        training_seconds=round(outcome.seconds, 1),
        device=recipe.device,
        library_versions={name: importlib.metadata.version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
        settings={key: str(value) for key, value in settings.items()},
    )

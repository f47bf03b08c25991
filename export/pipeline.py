"""The pipeline from a family and a dataset to an artifact: train, measure, write, verify."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from google.protobuf import timestamp_pb2

from export.artifacts import writer
from export.artifacts.reader import sha256
from export.datasets.loading import Dataset
from export.evaluation import formatting
from export.evaluation.figures import render_figure
from export.families.base import Family, Preset
from export.graphs import formats
from export.training import trainer
from export.training.checkpoint import Checkpoint
from samovar.v1 import manifest_pb2

SAMPLES_IMAGE = "samples.png"
CURVE_FILE = "training.json"
_UNTRAINED = trainer.TrainingResult(seconds=0, best=trainer.CurvePoint(0, math.nan, math.nan), curve=())
_LIBRARIES = ("samovar-applications", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class TrainingJob:
    """An artifact to train. Settings that are None have the value of the preset.

    `resume=False` discards the checkpoint of an interrupted run.
    """

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
    resume: bool = True

    @property
    def model_name(self) -> str:
        """The artifact's name: <dataset>-<family> unless a name is given."""
        return self.name or f"{self.data.name}-{self.family.name}"

    @property
    def suited_preset(self) -> Preset:
        """The preset for the kind of data."""
        return self.family.presets[self.preset].for_data(self.data.spec)

    @property
    def training_settings(self) -> trainer.Settings:
        """The preset's training settings, with the job's own settings applied."""
        preset = self.suited_preset.training
        return dataclasses.replace(
            preset,
            steps=self.steps or preset.steps,
            seconds=self.seconds or preset.seconds,
            learning_rate=self.learning_rate or preset.learning_rate,
            seed=self.seed,
            device=self.device,
        )


def run(job: TrainingJob, on_progress: Callable[[str], None] = lambda message: None) -> Path:
    """Train, measure, write and verify an artifact; an interrupted run of the same job resumes.

    Args:
        job: The artifact to train.
        on_progress: Called with each message for the user: resumption, figures of quality, export.

    Returns:
        The artifact's directory.

    Raises:
        ArtifactError: If the name or version cannot be used, or verification fails.
        CheckpointError: If there is a checkpoint of another run.
        TrainingError: If no validation loss is finite; nothing is left behind.
    """
    directory = writer.resolve_destination(job.models, job.model_name, job.version)
    torch.manual_seed(job.seed)
    network = job.family.build_network(job.data, job.suited_preset)
    checkpoint = Checkpoint(directory.parent, _identity(job, network))
    if not job.resume:
        checkpoint.remove()
    result = trainer.fit(
        network, job.data, job.training_settings, checkpoint=checkpoint, on_resume=on_progress
    )
    model = _build_model(job, network)
    quality = job.family.measure_quality(model.interpreter, job.data, job.suited_preset)
    for figure in quality:
        on_progress(formatting.format_quality(figure))
    attachments = {SAMPLES_IMAGE: _draw_samples(job, model, quality), CURVE_FILE: _curve_json(result)}
    on_progress("writing and verifying the graphs ...")
    metadata = writer.Metadata(_provenance(job, result), quality, attachments)
    writer.write(model, directory, job.formats, metadata)
    checkpoint.remove()
    return directory


def export_untrained(job: TrainingJob) -> Path:
    """Write an artifact with random weights and without quality figures, for tests and benchmarks."""
    directory = writer.resolve_destination(job.models, job.model_name, job.version)
    torch.manual_seed(job.seed)
    network = job.family.build_network(job.data, job.suited_preset)
    network.requires_grad_(False)
    for weights in network.parameters():
        # Layers that are initialized to zero would hide errors in the layers before them.
        weights.add_(0.05 * torch.randn_like(weights))
    metadata = writer.Metadata(_provenance(job, _UNTRAINED))
    writer.write(_build_model(job, network), directory, job.formats, metadata)
    return directory


def _identity(job: TrainingJob, network: trainer.Network) -> dict[str, str]:
    """Return everything that the trained weights depend on."""
    preset = job.suited_preset
    shapes = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
    settings = {
        "family": job.family.name,
        "data": job.data.sha256,
        "torch": torch.__version__,
        "network": sha256(repr(shapes).encode())[:12],
        "width": preset.width,
        "depth": preset.depth,
        "dropout": preset.dropout,
        **dataclasses.asdict(job.training_settings),
    }
    return {name: str(value) for name, value in settings.items()}


def _build_model(job: TrainingJob, network: trainer.Network) -> writer.Model:
    programs = job.family.build_programs(network, job.data)
    for program in programs:
        for _, module, _ in program.modules:
            module.eval()
    return writer.Model(
        name=job.model_name,
        family=job.family.name,
        description=job.family.description,
        data_spec=job.data.spec,
        programs=programs,
        examples=job.family.build_examples(job.data),
        unsupported_operations=job.family.unsupported_operations,
    )


def _draw_samples(job: TrainingJob, model: writer.Model, quality: Sequence[manifest_pb2.Quality]) -> bytes:
    """Return a PNG that shows real rows, samples and the quality figures."""
    caption = "\n".join(map(formatting.format_quality, quality))
    panels = job.family.build_plots(model.interpreter, job.data)
    return render_figure(model.name, caption, panels, model.data_spec.num_levels)


def _curve_json(result: trainer.TrainingResult) -> bytes:
    points = [dataclasses.asdict(point) for point in result.curve]
    return (json.dumps({"curve": points, "best_step": result.best.step}, indent=1) + "\n").encode()


def _provenance(job: TrainingJob, result: trainer.TrainingResult) -> manifest_pb2.Provenance:
    settings = {
        "preset": job.preset,
        "best_step": result.best.step,
        "threads": torch.get_num_threads(),
        **dataclasses.asdict(job.training_settings),
    }
    return manifest_pb2.Provenance(
        created=timestamp_pb2.Timestamp(seconds=int(time.time())),
        dataset=job.data.name,
        dataset_sha256=job.data.sha256,
        seed=job.seed,
        training_seconds=round(result.seconds, 1),
        device=job.device,
        library_versions={name: importlib.metadata.version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
        settings={key: str(value) for key, value in settings.items()},
    )

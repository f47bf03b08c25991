"""What is served while it is measured: untrained models of starter size, made once under build/bench."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from export.families.base import Family

OWN = Path(__file__).parent / "models"
FORMATS = ("onnx",)

DIFFUSION, PIXELCNN, EBM, LSTM = "digits-diffusion", "digits-pixelcnn", "digits-ebm", "text-lstm"
VAE, GAN, REALNVP, MLP, CNN = "digits-vae", "digits-gan", "digits-realnvp", "digits-mlp", "digits-cnn"
FAMILIES = {
    name: name.partition("-")[2] for name in (DIFFUSION, PIXELCNN, EBM, LSTM, VAE, GAN, REALNVP, MLP, CNN)
}
DECODER, TINY = "decoder", "tiny"
# A sampler and a model of one shot that are made in seconds: what quick benchmarks are content with.
QUICK = (LSTM, GAN)


def make(
    names: Sequence[str], directory: Path, preset: str = "starter", formats: Sequence[str] = FORMATS
) -> Path:
    """Make the artifacts that are missing, each in a directory of its own; returns `directory`."""
    missing = [name for name in names if not (directory / name / "1" / "manifest.json").exists()]
    for name in tqdm(missing, desc="making artifacts", unit="model", disable=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            _make(name, directory, preset, tuple(formats))
    return directory


def view(names: Sequence[str], directory: Path) -> Path:
    """A directory that shows some of the artifacts of another one."""
    shown = directory / ".shown" / "+".join(names)
    shown.mkdir(parents=True, exist_ok=True)
    for name in names:
        link = shown / name
        if not link.is_symlink():
            link.symlink_to((directory / name).resolve())
    return shown


def copies(count: int, directory: Path) -> Path:
    """So many tiny models under different names, tiny-0 and on."""
    from export import custom_model

    for index in tqdm(range(count), desc="making copies", unit="model", disable=None):
        if not (directory / f"{TINY}-{index}").exists():
            custom_model.write(OWN / f"{TINY}.py", directory, f"{TINY}-{index}", FORMATS)
    return directory


def _make(name: str, directory: Path, preset: str, formats: tuple[str, ...]) -> None:
    from export import custom_model, pipeline
    from export.datasets import loading
    from export.families import FAMILIES as KNOWN

    if name not in FAMILIES:
        custom_model.write(OWN / f"{name}.py", directory, name, formats)
        return
    entry = KNOWN[FAMILIES[name]]
    family = _unmeasured(entry.load(), preset)
    pipeline.export_untrained(
        pipeline.TrainingJob(family, loading.load(entry.datasets[0]), directory, preset, formats)
    )


def _unmeasured(family: "Family", preset: str) -> "Family":
    """The family, but with as few rows to estimate its normaliser from as can be: nobody reads it here."""
    brief = copy.copy(family)
    kept = family.presets[preset]
    brief.presets = {preset: dataclasses.replace(kept, evaluation_rows=16)}
    return brief

"""Artifacts to measure: untrained models of the starter size, made once in build/bench."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from export.families.base import Family

CUSTOM_MODELS = Path(__file__).parent / "models"
FORMATS = ("onnx",)

DIFFUSION, PIXELCNN, EBM, LSTM = "digits-diffusion", "digits-pixelcnn", "digits-ebm", "text-lstm"
VAE, GAN, REALNVP, MLP, CNN = "digits-vae", "digits-gan", "digits-realnvp", "digits-mlp", "digits-cnn"
FAMILIES = {
    name: name.partition("-")[2] for name in (DIFFUSION, PIXELCNN, EBM, LSTM, VAE, GAN, REALNVP, MLP, CNN)
}
DECODER, TINY = "decoder", "tiny"
# The models of quick benchmarks, which are made in seconds: one with steps and one without.
QUICK = (LSTM, GAN)


def make(
    names: Sequence[str], directory: Path, preset: str = "starter", formats: Sequence[str] = FORMATS
) -> Path:
    """Make the missing artifacts NAME/1 in `directory`; return `directory`."""
    missing = [name for name in names if not (directory / name / "1" / "manifest.json").exists()]
    for name in tqdm(missing, desc="making artifacts", unit="model", disable=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            _make(name, directory, preset, tuple(formats))
    return directory


def link(names: Sequence[str], directory: Path) -> Path:
    """Return a directory with links to some of the artifacts of `directory`."""
    links = directory / ".links" / "+".join(names)
    links.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = links / name
        if not path.is_symlink():
            path.symlink_to((directory / name).resolve())
    return links


def make_copies(count: int, directory: Path) -> Path:
    """Make `count` tiny models named tiny-0, tiny-1, ...; return `directory`."""
    from export import custom_model

    for index in tqdm(range(count), desc="making copies", unit="model", disable=None):
        if not (directory / f"{TINY}-{index}").exists():
            custom_model.write(CUSTOM_MODELS / f"{TINY}.py", directory, f"{TINY}-{index}", FORMATS)
    return directory


def _make(name: str, directory: Path, preset: str, formats: tuple[str, ...]) -> None:
    from export import custom_model, pipeline
    from export.datasets import loading
    from export.families import FAMILIES as FAMILY_ENTRIES

    if name not in FAMILIES:
        custom_model.write(CUSTOM_MODELS / f"{name}.py", directory, name, formats)
        return
    entry = FAMILY_ENTRIES[FAMILIES[name]]
    family = _with_small_evaluation(entry.load(), preset)
    pipeline.export_untrained(
        pipeline.TrainingJob(family, loading.load(entry.datasets[0]), directory, preset, formats)
    )


def _with_small_evaluation(family: "Family", preset: str) -> "Family":
    """Return the family with few evaluation rows: the normalizer that they estimate is not used here."""
    family = copy.copy(family)
    family.presets = {preset: dataclasses.replace(family.presets[preset], evaluation_rows=16)}
    return family

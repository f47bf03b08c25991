"""Datasets as arrays with fixed splits.

Images are the stored integers: scaling is part of the model, so densities are of integers and bits per
dimension need no offset. Points are real numbers; the doc of the data spec's tensor states their
coordinates, which densities refer to. Sequences are rows of tokens, padded with 0.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.datasets import chorales as chorales_corpus
from export.datasets import text as text_corpus
from export.graphs.program import DataSpec, TensorSpec

VALIDATION_FRACTION = 0.12
# Number of rows and random seed of the training and the test rows.
_MOONS = ((30_000, 0), (10_000, 1))
# Bound of a coordinate of the moons in either direction; no row is beyond 2. Energies of points within the
# bound are finite in float32; energies of arbitrary numbers are not.
POINT_LIMIT = 100


class DataError(ValueError):
    """Raised for a dataset that does not exist or does not have the expected layout."""


@dataclass(frozen=True)
class Split:
    """Rows [N, *shape], uint8 for images and tokens, float32 for points, with labels int64 [N]."""

    rows: NDArray[Any]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | NDArray[Any]) -> "Split":
        return Split(self.rows[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A named dataset: validation rows select the best weights, test rows give the reported figures.

    `sha256` is the hex digest of the training rows.
    """

    name: str
    spec: DataSpec
    train: Split
    validation: Split
    test: Split
    sha256: str


def digits() -> Dataset:
    """Return 8x8 digits with 17 levels (Alpaydin and Kaynak, UCI, 1998): 1347 training and 450 test rows."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    rows, labels = load_digits(return_X_y=True)
    images, classes = rows.astype(np.uint8).reshape(-1, 8, 8), labels.astype(np.int64)
    parts = train_test_split(images, classes, test_size=450, stratify=classes, random_state=0)
    train, test = Split(parts[0], parts[2]), Split(parts[1], parts[3])
    return _with_validation("digits", _image_spec(train, 17, tuple(map(str, range(10)))), train, test)


def moons() -> Dataset:
    """Return two half circles with noise 0.05: 30,000 training and 10,000 test rows, standardized.

    The entropy of the distribution is 1.131 nats in these coordinates; no density does better on average.
    """
    from sklearn.datasets import make_moons

    train, test = (make_moons(count, noise=0.05, random_state=seed) for count, seed in _MOONS)
    mean, scale = train[0].mean(0), train[0].std(0)
    splits = [
        Split(((rows - mean) / scale).astype(np.float32), labels.astype(np.int64))
        for rows, labels in (train, test)
    ]
    doc = "make_moons coordinates, minus ({:.4f}, {:.4f}), divided by ({:.4f}, {:.4f})".format(*mean, *scale)
    point = TensorSpec("point", "float32", (2,), -POINT_LIMIT, POINT_LIMIT, doc)
    return _with_validation("moons", DataSpec("vector", point, class_labels=("upper", "lower")), *splits)


def text() -> Dataset:
    """Return the language reference of the standard library's pydoc as characters, in rows of 512."""
    return _token_dataset("text", text_corpus.load_standard_library(), "characters")


def chorales() -> Dataset:
    """Return Bach's chorales, four tokens per eighth note.

    Raises:
        DataError: If music21 is not installed.
    """
    try:
        corpus = chorales_corpus.load_chorales()
    except ModuleNotFoundError as error:
        raise DataError(
            f"dataset 'chorales' needs the package music21: {error}; install it with: pip install music21"
        ) from error
    return _token_dataset("chorales", corpus, "soprano, alto, tenor and bass of each eighth note")


DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "moons": moons,
    "text": text,
    "chorales": chorales,
}


def load(name: str, directory: Path | None = None) -> Dataset:
    """Load a dataset by name, or from a folder if one is given.

    Raises:
        DataError: If there is no dataset with this name, or the folder does not have the expected layout.
    """
    if directory is not None:
        return load_folder(directory)
    if name not in DATASETS:
        raise DataError(
            f"--data: unknown dataset {name!r}; expected one of: {', '.join(DATASETS)}, "
            "or a folder as --data-dir"
        )
    return DATASETS[name]()


def load_folder(directory: Path) -> Dataset:
    """Load a user folder: text in input.txt, or images in train.parquet and test.parquet.

    The Parquet columns are image: struct<bytes, path> and label: int64. Gray images become
    [height, width], others [height, width, channels], with 256 levels.

    Raises:
        DataError: If files or columns are missing, or the images have different sizes.
    """
    name = "".join(c if c.isalnum() else "-" for c in directory.resolve().name.lower()).strip("-")
    if (directory / "input.txt").is_file():
        return _token_dataset(name, text_corpus.read_corpus(directory / "input.txt"), "characters")
    train, class_names = _read_parquet(directory / "train.parquet")
    test, _ = _read_parquet(directory / "test.parquet")
    class_labels = class_names or tuple(map(str, range(int(train.labels.max()) + 1)))
    return _with_validation(name, _image_spec(train, 256, class_labels), train, test)


def first_half_mask(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a mask, uint8 like rows [N, length, ...], that is 1 in the first half (the top of images)."""
    mask = np.zeros(rows.shape, np.uint8)
    mask[:, : rows.shape[1] // 2] = 1
    return mask


def _image_spec(split: Split, num_levels: int, class_labels: tuple[str, ...]) -> DataSpec:
    highest = num_levels - 1
    pixels = TensorSpec(
        "image", "uint8", split.rows.shape[1:], 0, highest, doc=f"brightness, integers 0..{highest}"
    )
    return DataSpec("image", pixels, num_levels=num_levels, class_labels=class_labels)


def _token_dataset(name: str, corpus: text_corpus.Corpus, doc: str) -> Dataset:
    last = len(corpus.vocabulary) - 1
    sequence = TensorSpec(
        "sequence", "uint8", corpus.train.shape[1:], 0, last,
        f"{doc}, as indices 1..{last} of the vocabulary; the first 0 ends it",
    )  # fmt: skip
    train, validation, test = (
        Split(rows, np.zeros(len(rows), np.int64)) for rows in (corpus.train, corpus.validation, corpus.test)
    )
    spec = DataSpec("tokens", sequence, num_levels=last + 1, vocabulary=corpus.vocabulary)
    digest = hashlib.sha256(corpus.train.tobytes()).hexdigest()
    return Dataset(name, spec, train, validation, test, digest)


def _with_validation(name: str, spec: DataSpec, train: Split, test: Split) -> Dataset:
    """Return a dataset whose validation split is taken from the training rows, stratified by label."""
    from sklearn.model_selection import train_test_split

    train_indices, validation_indices = train_test_split(
        np.arange(len(train)), test_size=VALIDATION_FRACTION, stratify=train.labels, random_state=0
    )
    return Dataset(
        name=name,
        spec=spec,
        train=train[train_indices],
        validation=train[validation_indices],
        test=test,
        sha256=hashlib.sha256(train.rows[train_indices].tobytes()).hexdigest(),
    )


def _read_parquet(path: Path) -> tuple[Split, tuple[str, ...]]:
    """Return the rows and labels of a Parquet file, and the class names if it has them."""
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(
            f"{path} not found; expected train.parquet and test.parquet, or input.txt, in the folder"
        )
    table = pyarrow.parquet.read_table(path)
    if not {"image", "label"} <= set(table.column_names):
        raise DataError(f"{path}: expected the columns image and label, got {', '.join(table.column_names)}")
    cells = tqdm(table["image"].to_pylist(), desc=f"  reading {path.name}", unit="image", dynamic_ncols=True)
    images = [_decode_image(cell["bytes"]) for cell in cells]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise DataError(f"{path}: expected images of one size and mode, got the shapes {sorted(shapes)}")
    return Split(np.stack(images), table["label"].to_numpy().astype(np.int64)), _class_names(table)


def _decode_image(encoded: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def _class_names(table: Any) -> tuple[str, ...]:
    """Return the class names from the Hugging Face metadata of a table; empty without metadata."""
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata)["info"]["features"] if metadata else {}
    return tuple(features.get("label", {}).get("names", ()))

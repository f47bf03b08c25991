"""Data sets as arrays with a fixed split. Knows no model.

Images are always the stored integers: scaling belongs to the models, so that
densities are of integers and bits per dimension need no offset. Points are real
numbers, and their densities are in the coordinates that the value's doc names.
Sequences are rows of tokens, 0 after the last one.
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

from export.datasets import chorales as music
from export.datasets import text as writing
from export.graphs.program import DataSpec, TensorSpec

VALIDATION_SHARE = 0.12
# Rows and seed, to learn and to test.
_MOONS = ((30_000, 0), (10_000, 1))
# Of a coordinate of the moons in either direction; the farthest row is at 2. Energies of points so far out
# are finite in float32, and of any number they are not.
POINT_LIMIT = 100


class DataError(ValueError):
    """A data set that is not there, or not laid out as expected."""


@dataclass(frozen=True)
class Split:
    """Rows [N, *shape], uint8 for images and float32 for points, with labels int64 [N]."""

    rows: NDArray[Any]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | NDArray[Any]) -> "Split":
        return Split(self.rows[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Validation rows, cut from the training rows, choose a model; test rows report on it."""

    name: str
    spec: DataSpec
    train: Split
    validation: Split
    test: Split
    sha256: str


def digits() -> Dataset:
    """8x8 digits with 17 levels (Alpaydin and Kaynak, UCI, 1998): 1347 rows to learn, 450 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    rows, labels = load_digits(return_X_y=True)
    shaped, classes = rows.astype(np.uint8).reshape(-1, 8, 8), labels.astype(np.int64)
    split = train_test_split(shaped, classes, test_size=450, stratify=classes, random_state=0)
    learn, test = Split(split[0], split[2]), Split(split[1], split[3])
    return _dataset("digits", _images(learn, 17, tuple(map(str, range(10)))), learn, test)


def moons() -> Dataset:
    """Two half circles, noise 0.05, standardised by the 30,000 rows to learn; 10,000 more to test.

    The entropy of the distribution is 1.131 nats in these coordinates: no density does better on average.
    """
    from sklearn.datasets import make_moons

    learn, test = (make_moons(count, noise=0.05, random_state=seed) for count, seed in _MOONS)
    mean, spread = learn[0].mean(0), learn[0].std(0)
    parts = [
        Split(((rows - mean) / spread).astype(np.float32), labels.astype(np.int64))
        for rows, labels in (learn, test)
    ]
    doc = "coordinates of make_moons, less {:.4f}, {:.4f}, over {:.4f}, {:.4f}".format(*mean, *spread)
    point = TensorSpec("point", "float32", (2,), -POINT_LIMIT, POINT_LIMIT, doc)
    return _dataset("moons", DataSpec("vector", point, class_labels=("upper", "lower")), *parts)


def text() -> Dataset:
    """The language reference of the standard library's pydoc, character by character, in rows of 512."""
    return _sequences("text", writing.load_standard_library(), "characters")


def chorales() -> Dataset:
    """Bach's chorales, four tokens an eighth note; DataError when music21 is not installed."""
    try:
        corpus = music.load_chorales()
    except ModuleNotFoundError as error:
        raise DataError(
            f"the chorales come with music21, and {error}; install it with: pip install music21"
        ) from None
    return _sequences("chorales", corpus, "soprano, alto, tenor and bass of each eighth note in turn")


DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "moons": moons,
    "text": text,
    "chorales": chorales,
}


def load(name: str, directory: Path | None = None) -> Dataset:
    """A data set by name, or from a folder; DataError when there is none."""
    if directory is not None:
        return load_folder(directory)
    if name not in DATASETS:
        raise DataError(
            f"expected one of {', '.join(DATASETS)} as --data, or a folder as --data-dir; got {name!r}"
        )
    return DATASETS[name]()


def load_folder(directory: Path) -> Dataset:
    """Text in input.txt, or images in train.parquet and test.parquet: image struct<bytes, path>, label int64.

    Grey images become [height, width], others [height, width, channels], with 256 levels.
    """
    name = "".join(c if c.isalnum() else "-" for c in directory.resolve().name.lower()).strip("-")
    if (directory / "input.txt").is_file():
        return _sequences(name, writing.read_corpus(directory / "input.txt"), "characters")
    learn, names = _parquet(directory / "train.parquet")
    test, _ = _parquet(directory / "test.parquet")
    labels = names or tuple(map(str, range(int(learn.labels.max()) + 1)))
    return _dataset(name, _images(learn, 256, labels), learn, test)


def first_half_mask(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """A mask, uint8 like rows [N, length, ...], that is 1 in the first half: of images, the upper one."""
    known = np.zeros(rows.shape, np.uint8)
    known[:, : rows.shape[1] // 2] = 1
    return known


def _images(part: Split, levels: int, class_labels: tuple[str, ...]) -> DataSpec:
    pixels = TensorSpec(
        "image", "uint8", part.rows.shape[1:], 0, levels - 1, doc=f"brightness, integers 0..{levels - 1}"
    )
    return DataSpec("image", pixels, num_levels=levels, class_labels=class_labels)


def _sequences(name: str, corpus: writing.Corpus, doc: str) -> Dataset:
    last, parts = len(corpus.vocabulary) - 1, (corpus.train, corpus.validation, corpus.test)
    sequence = TensorSpec(
        "sequence", "uint8", corpus.train.shape[1:], 0, last,
        f"{doc}, as indices 1..{last} of the vocabulary; the first 0 ends it",
    )  # fmt: skip
    train, validation, test = (Split(rows, np.zeros(len(rows), np.int64)) for rows in parts)
    value = DataSpec("tokens", sequence, num_levels=last + 1, vocabulary=corpus.vocabulary)
    digest = hashlib.sha256(corpus.train.tobytes()).hexdigest()
    return Dataset(name, value, train, validation, test, digest)


def _dataset(name: str, value: DataSpec, learn: Split, test: Split) -> Dataset:
    from sklearn.model_selection import train_test_split

    chosen, held = train_test_split(
        np.arange(len(learn)), test_size=VALIDATION_SHARE, stratify=learn.labels, random_state=0
    )
    return Dataset(
        name=name,
        spec=value,
        train=learn[chosen],
        validation=learn[held],
        test=test,
        sha256=hashlib.sha256(learn.rows[chosen].tobytes()).hexdigest(),
    )


def _parquet(path: Path) -> tuple[Split, tuple[str, ...]]:
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"expected {path}: a data folder holds train.parquet and test.parquet, or input.txt")
    table = pyarrow.parquet.read_table(path)
    if not {"image", "label"} <= set(table.column_names):
        raise DataError(f"{path}: expected the columns image and label, got {', '.join(table.column_names)}")
    cells = tqdm(table["image"].to_pylist(), desc=f"  reading {path.name}", unit="image", dynamic_ncols=True)
    images = [_decode(cell["bytes"]) for cell in cells]
    if len({image.shape for image in images}) != 1:
        raise DataError(f"{path}: expected images of one size and mode")
    return Split(np.stack(images), table["label"].to_numpy().astype(np.int64)), _class_names(table)


def _decode(encoded: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def _class_names(table: Any) -> tuple[str, ...]:
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata)["info"]["features"] if metadata else {}
    return tuple(features.get("label", {}).get("names", ()))

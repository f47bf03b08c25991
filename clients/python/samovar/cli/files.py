"""Arrays in files, by the file's ending. Knows what a value looks like, and no calls."""

import csv
import io
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from samovar import midi, png, tokens
from samovar.model import DataSpec, TensorSpec, ValueKind
from samovar.tensors import Array


class UnsuitableFile(ValueError):
    """A file that cannot be read or written as it was asked for; the message says what can."""


Arrays = Mapping[str, Array]


def check(path: Path, value: DataSpec, main: TensorSpec) -> None:
    """UnsuitableFile when the main output cannot be shown in such a file."""
    if path.suffix == ".png" and not (value.kind is ValueKind.IMAGE and main.shape == value.tensor.shape):
        raise UnsuitableFile(f"{path}: .png is for images, and {main.name} is {main}; use .npy or .npz")
    if path.suffix == ".txt" and not value.vocabulary:
        raise UnsuitableFile(f"{path}: .txt is for text, and {main.name} is {main}; use .npy or .npz")
    if path.suffix == ".mid" and not midi.is_music(value.vocabulary):
        raise UnsuitableFile(f"{path}: .mid is for music, and {main.name} is {main}; use .npy or .npz")


def write(path: Path, arrays: Arrays, value: DataSpec) -> None:
    """Write arrays, the main one first; the file appears complete or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(_ENCODERS[path.suffix](arrays, value))
    os.replace(unfinished, path)


def write_pairs(path: Path, above: Array, below: Array, value: DataSpec) -> None:
    """Write images as .png, each of the first series above its partner of the second."""
    low, high = _range(value)
    path.write_bytes(png.pairs(png.levels(above, low, high), png.levels(below, low, high)))


def read(path: Path) -> Array | dict[str, Array]:
    """An array from .npy, or arrays by name from .npz."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return dict(content)
    except OSError as error:
        raise UnsuitableFile(f"{path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UnsuitableFile(f"{path}: expected a .npy or .npz file of numbers: {error}") from error


def _range(value: DataSpec) -> tuple[float, float]:
    low = value.tensor.minimum or 0.0
    if value.tensor.maximum is not None:
        return low, value.tensor.maximum
    return low, low + max(value.num_levels - 1, 1)


def _npy(arrays: Arrays, value: DataSpec) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, next(iter(arrays.values())))
    return buffer.getvalue()


def _npz(arrays: Arrays, value: DataSpec) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _png(arrays: Arrays, value: DataSpec) -> bytes:
    return png.grid(png.levels(next(iter(arrays.values())), *_range(value)))


def _txt(arrays: Arrays, value: DataSpec) -> bytes:
    return "".join(f"{line}\n" for line in tokens.decode(next(iter(arrays.values())), value)).encode()


def _mid(arrays: Arrays, value: DataSpec) -> bytes:
    return midi.encode([tokens.words_of(row, value) for row in next(iter(arrays.values()))])


def _csv(arrays: Arrays, value: DataSpec) -> bytes:
    """One line a row; arrays of more than one number a row are left out."""
    columns = {name: array for name, array in arrays.items() if array.ndim == 1}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["row", *columns])
    numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
    writer.writerows([row, *values] for row, values in enumerate(numbers))
    return buffer.getvalue().encode()


_ENCODERS: dict[str, Callable[[Arrays, DataSpec], bytes]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".png": _png,
    ".txt": _txt,
    ".mid": _mid,
    ".csv": _csv,
}

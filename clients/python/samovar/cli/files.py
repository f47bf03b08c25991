"""Array files. The suffix of a file name selects its format."""

import csv
import io
import os
import zipfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from samovar import midi, png, tokens
from samovar.model import DataKind, DataSpec, TensorSpec
from samovar.tensors import Array


class FileError(ValueError):
    """A file that cannot be read, or arrays that the format of a file cannot hold."""


Arrays = Mapping[str, Array]


def check_suffix(path: Path, data_spec: DataSpec, output: TensorSpec) -> None:
    """Check that a file of this suffix can hold the main output of an operation.

    Raises:
        FileError: it cannot, such as text in a .png file, or a library is missing.
    """
    is_image = data_spec.kind is DataKind.IMAGE and output.shape == data_spec.tensor.shape
    if path.suffix == ".png" and not is_image:
        raise _wrong_suffix(path, "images", output)
    if path.suffix == ".txt" and not data_spec.vocabulary:
        raise _wrong_suffix(path, "text", output)
    if path.suffix == ".mid" and not midi.is_music(data_spec.vocabulary):
        raise _wrong_suffix(path, "music", output)
    if path.suffix == ".mid" and find_spec("mido") is None:
        raise FileError(f"cannot write {path}: mido is not installed; run: pip install 'samovar[midi]'")


def write(path: Path, arrays: Arrays, data_spec: DataSpec) -> None:
    """Write arrays atomically.

    Args:
        path: its suffix is .npy, .npz, .png, .txt, .mid or .csv.
        arrays: arrays [rows, ...] by name, the main output first.
        data_spec: the meaning of the main output, for .png, .txt and .mid.
    """
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(_ENCODERS[path.suffix](arrays, data_spec))
    os.replace(partial, path)


def write_pairs(path: Path, upper: Array, lower: Array, data_spec: DataSpec) -> None:
    """Write two series of images [N, H, W, ...] as a .png, image i of `upper` above image i of `lower`."""
    low, high = _value_range(data_spec)
    path.write_bytes(png.pairs(png.levels(upper, low, high), png.levels(lower, low, high)))


def read(path: Path) -> Array | dict[str, Array]:
    """Return the array of a .npy file, or the arrays of a .npz file by name.

    Raises:
        FileError: the file does not exist, or holds no numeric arrays.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return dict(content)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(f"cannot read {path}: expected a .npy or .npz file of numbers: {error}") from error


def _wrong_suffix(path: Path, content: str, output: TensorSpec) -> FileError:
    return FileError(
        f"cannot write {path}: {path.suffix} files hold {content}, got {output.name} {output};"
        " use .npy or .npz"
    )


def _value_range(data_spec: DataSpec) -> tuple[float, float]:
    low = data_spec.tensor.minimum or 0.0
    if data_spec.tensor.maximum is not None:
        return low, data_spec.tensor.maximum
    return low, low + max(data_spec.num_levels - 1, 1)


def _npy(arrays: Arrays, data_spec: DataSpec) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, next(iter(arrays.values())))
    return buffer.getvalue()


def _npz(arrays: Arrays, data_spec: DataSpec) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _png(arrays: Arrays, data_spec: DataSpec) -> bytes:
    return png.grid(png.levels(next(iter(arrays.values())), *_value_range(data_spec)))


def _txt(arrays: Arrays, data_spec: DataSpec) -> bytes:
    return "".join(f"{line}\n" for line in tokens.decode(next(iter(arrays.values())), data_spec)).encode()


def _mid(arrays: Arrays, data_spec: DataSpec) -> bytes:
    return midi.encode([tokens.token_texts(row, data_spec) for row in next(iter(arrays.values()))])


def _csv(arrays: Arrays, data_spec: DataSpec) -> bytes:
    """Return one line per row, without the arrays that have more than one number per row."""
    columns = {name: array for name, array in arrays.items() if array.ndim == 1}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["row", *columns])
    lines = zip(*(column.tolist() for column in columns.values()), strict=True)
    writer.writerows([row, *values] for row, values in enumerate(lines))
    return buffer.getvalue().encode()


_ENCODERS: dict[str, Callable[[Arrays, DataSpec], bytes]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".png": _png,
    ".txt": _txt,
    ".mid": _mid,
    ".csv": _csv,
}

"""Datasets: the fixed splits, and folders in the Hugging Face layout."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from export.datasets import loading


def test_digits_have_fixed_split_and_hash(digits: loading.Dataset) -> None:
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1185, 162, 450)
    assert digits.train.rows.shape[1:] == digits.spec.tensor.shape == (8, 8)
    assert digits.train.rows.dtype == np.uint8
    assert (int(digits.train.rows.max()), digits.spec.num_levels) == (16, 17)
    assert digits.sha256 == loading.digits().sha256


def test_moons_bounds_are_far_from_all_rows() -> None:
    moons = loading.moons()
    tensor, rows = moons.spec.tensor, np.concatenate([moons.train.rows, moons.test.rows])
    assert (tensor.minimum, tensor.maximum) == (-100, 100)
    assert 10 * np.abs(rows).max() < 100


def test_digits_splits_share_no_row(digits: loading.Dataset) -> None:
    """The digits themselves contain no duplicates."""
    rows = np.concatenate([digits.train.rows, digits.validation.rows, digits.test.rows])
    assert len(np.unique(rows.reshape(len(rows), -1), axis=0)) == 1797


def write_folder(directory: Path, mode: str, names: list[str] | None) -> None:
    channels = {"L": (), "RGB": (3,)}[mode]
    for split, count in (("train", 40), ("test", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, 6, 5, *channels), np.uint8)
        table = pyarrow.table(
            {
                "image": [{"bytes": png(image), "path": None} for image in images],
                "label": [index % 2 for index in range(count)],
            }
        )
        if names:
            features = {"label": {"names": names, "_type": "ClassLabel"}}
            metadata = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": metadata})
        pyarrow.parquet.write_table(table, directory / f"{split}.parquet")


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(("mode", "shape"), [("L", (6, 5)), ("RGB", (6, 5, 3))])
def test_load_folder_takes_dimensions_and_class_names_from_files(
    mode: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "My Images"
    folder.mkdir()
    write_folder(folder, mode, ["cat", "dog"])
    loaded = loading.load("digits", folder)
    assert (loaded.name, loaded.spec.num_levels) == ("my-images", 256)
    assert loaded.spec.tensor.shape == shape
    assert loaded.spec.class_labels == ("cat", "dog")
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (35, 5, 10)


def test_load_folder_without_class_names_numbers_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, "L", None)
    assert loading.load_folder(tmp_path).spec.class_labels == ("0", "1")


def test_load_folder_rejects_folder_without_data_files(tmp_path: Path) -> None:
    with pytest.raises(
        loading.DataError, match=r"train.parquet not found; expected train.parquet and test.parquet"
    ):
        loading.load_folder(tmp_path)


def test_load_folder_rejects_other_columns(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"img": [1], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(loading.DataError, match="expected the columns image and label, got img, label"):
        loading.load_folder(tmp_path)


def test_load_rejects_unknown_name() -> None:
    with pytest.raises(loading.DataError, match="unknown dataset 'mnist'; expected one of: digits"):
        loading.load("mnist")


def test_moons_are_standardized_by_training_rows() -> None:
    moons = loading.load("moons")
    assert (len(moons.train), len(moons.validation), len(moons.test)) == (26_400, 3_600, 10_000)
    assert (moons.spec.kind, moons.spec.tensor.shape) == ("vector", (2,))
    assert moons.train.rows.dtype == np.float32
    rows = np.concatenate([moons.train.rows, moons.validation.rows])
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(rows.std(0), 1, atol=1e-6)
    assert moons.sha256 == loading.moons().sha256


def test_moons_first_class_is_upper_half_circle() -> None:
    moons = loading.moons()
    upper, lower = (moons.test.rows[moons.test.labels == label, 1] for label in (0, 1))
    assert moons.spec.class_labels == ("upper", "lower")
    assert lower.mean() < upper.mean()

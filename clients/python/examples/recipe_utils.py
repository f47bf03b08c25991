"""Functions that the recipes share: select models, load images, save a grid. This module is not a recipe."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

import samovar
from samovar import png
from samovar.cli import files

Array = NDArray[Any]


@dataclass(frozen=True)
class Images:
    """Images [N, *shape] with their class indices [N], or -1 if the classes are unknown."""

    rows: Array
    labels: Array
    source: str

    def __getitem__(self, index: slice) -> "Images":
        return Images(self.rows[index], self.labels[index], self.source)


def build_parser(doc: str, output: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all recipes have.

    Args:
        doc: the recipe's docstring, which `--help` prints.
        output: default name of the output file.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address",
        default="127.0.0.1:8001",
        metavar="HOST:PORT",
        help="address of the server (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="PATH",
        help="input images: a .npy file, a .npz file with the arrays image and label, or a directory of .png "
        "files, which needs Pillow (default: samples of a model)",
    )
    parser.add_argument(
        "--source",
        default="",
        metavar="MODEL",
        help="model that samples the input images if there is no --images (default: the first suitable one)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help="output .png file (default: %(default)s)",
    )
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument `model`, which selects one model; "" selects the first suitable one."""
    parser.add_argument(
        "model", nargs="?", default="", metavar="MODEL", help="model to use (default: the first suitable one)"
    )


def add_number(parser: argparse.ArgumentParser, flag: str, default: float, text: str) -> None:
    """Add an option that takes a number of the type of its default."""
    parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: %(default)s)")


def find_models(
    client: samovar.Client, is_suitable: Callable[[samovar.Model], bool], requirement: str
) -> list[samovar.Model]:
    """Return the suitable image models, in their default versions.

    Args:
        client: connection to a server.
        is_suitable: condition on a model.
        requirement: the condition in words, for the error message.

    Raises:
        SystemExit: there is no suitable model.
    """
    models = [
        model
        for model in client.models()
        if model.is_default and model.data_spec.kind == "image" and is_suitable(model)
    ]
    return models or _fail(f"found no image model that {requirement}; `samovar models` lists the models")


def with_same_rows(models: Sequence[samovar.Model]) -> list[samovar.Model]:
    """Return the models whose rows have the type, shape and levels of those of the first model."""
    return [model for model in models if _row_type(model) == _row_type(models[0])]


def has_inputs(operation: samovar.Operation, *names: str) -> bool:
    """Return whether an operation has these inputs, required or optional."""
    return set(names) <= {input_.tensor.name for input_ in operation.inputs}


def can_round_trip(model: samovar.Model) -> bool:
    """Return whether `decode` needs nothing but the first output of `encode`."""
    if not {"encode", "decode"} <= set(model.operations):
        return False
    required = [input_.tensor.shape for input_ in model.operations["decode"].inputs if not input_.optional]
    return required == [model.operations["encode"].outputs[0].shape]


def find_classifiers(client: samovar.Client, model: samovar.Model) -> list[samovar.Model]:
    """Return the models that classify the rows of a model into the classes of that model."""
    classifiers = [each for each in client.models() if each.is_default and "classify" in each.operations]
    return [
        classifier
        for classifier in with_same_rows([model, *classifiers])[1:]
        if classifier.data_spec.class_labels == model.data_spec.class_labels
    ]


def load_images(
    client: samovar.Client,
    model: samovar.Model,
    options: argparse.Namespace,
    count: int,
    needs_labels: bool = False,
) -> Images:
    """Return images with the type and shape of a model's rows.

    Args:
        client: connection to a server.
        model: the model that the images are for.
        options: options of `build_parser`. With --images, `count` images of that file in an order that
            depends on --seed; otherwise samples of a model, with the classes in rotation.
        count: number of images.
        needs_labels: whether the classes of the images must be known.

    Raises:
        SystemExit: the file has too few images, or images of another shape, or no labels.
    """
    if options.images:
        return _read_images(model, options, count, needs_labels)
    sources = find_models(
        client,
        lambda source: _can_sample_for(source, model, needs_labels, options.source),
        "samples images of this shape",
    )
    source = next((source for source in sources if source.name != model.name), sources[0])
    num_classes = len(source.data_spec.class_labels)
    has_labels = num_classes and has_inputs(source.operations["sample"], "label")
    labels = np.arange(count) % num_classes if has_labels else np.full(count, -1)
    inputs = {"label": labels} if has_labels else {}
    rows = client.sample(source.name, count, seed=options.seed + 1, inputs=inputs).value
    return Images(rows, labels, f"samples of {source.name}")


def save_grid(path: Path, grid: Sequence[Array], model: samovar.Model) -> None:
    """Save a grid of images as a .png file.

    Args:
        path: the file.
        grid: the rows of the grid from top to bottom, [columns, *shape] each.
        model: a model with such images.
    """
    low = model.data_spec.tensor.minimum or 0
    high = model.data_spec.tensor.maximum or max(model.data_spec.num_levels - 1, 1)
    path.write_bytes(png.grid(png.levels(np.concatenate(grid), low, high), columns=len(grid[0])))
    print(f"wrote {path}")


def run_recipe(recipe: Callable[[], None]) -> None:
    """Run a recipe. An error of the client or of a file ends the program with one line."""
    try:
        recipe()
    except (samovar.SamovarError, files.FileError) as error:
        _fail(str(error))


def _can_sample_for(source: samovar.Model, model: samovar.Model, needs_labels: bool, name: str) -> bool:
    sample = source.operations.get("sample")
    if sample is None or any(not input_.optional for input_ in sample.inputs):
        return False
    same_classes = source.data_spec.class_labels == model.data_spec.class_labels
    gives_labels = same_classes and has_inputs(sample, "label")
    is_selected = name in ("", source.name)
    return is_selected and _row_type(source) == _row_type(model) and (gives_labels or not needs_labels)


def _row_type(model: samovar.Model) -> tuple[object, ...]:
    spec = model.data_spec
    return spec.tensor.dtype, spec.tensor.shape, spec.num_levels


def _read_images(model: samovar.Model, options: argparse.Namespace, count: int, needs_labels: bool) -> Images:
    path = options.images
    content = _read_pngs(path) if path.is_dir() else files.read(path)
    arrays = content if isinstance(content, dict) else {"image": content}
    rows, shape = arrays.get("image", np.zeros(0)), model.data_spec.tensor.shape
    if rows.shape[1:] != shape or not len(rows):
        _fail(f"{path}: expected images [N, {', '.join(map(str, shape))}], got {list(rows.shape)}")
    if needs_labels and "label" not in arrays:
        _fail(f"{path}: missing labels; expected a .npz file with the arrays image and label")
    if len(rows) < count:
        _fail(f"{path}: expected at least {count} images, got {len(rows)}; see --help for smaller counts")
    order = np.random.default_rng(options.seed).permutation(len(rows))[:count]
    labels = np.asarray(arrays.get("label", np.full(len(rows), -1)))
    return Images(rows[order], labels[order], str(path))


def _read_pngs(directory: Path) -> Array:
    from PIL import Image

    return np.stack([np.asarray(Image.open(path)) for path in sorted(directory.glob("*.png"))])


def _fail(message: str) -> NoReturn:
    raise SystemExit(message)

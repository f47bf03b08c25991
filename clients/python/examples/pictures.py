"""What the recipes share: a server's models, images to work on, and the picture that is left; no recipe."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import samovar
from samovar import png
from samovar.cli import files

Rows = NDArray[Any]


@dataclass(frozen=True)
class Images:
    """Rows [N, *shape] with their classes [N], -1 where they are not known, and where they come from."""

    rows: Rows
    labels: Rows
    origin: str

    def __getitem__(self, part: slice) -> "Images":
        return Images(self.rows[part], self.labels[part], self.origin)


def parser(doc: str, picture: str) -> argparse.ArgumentParser:
    """The options that every recipe has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:8001", help="HOST:PORT of the server (%(default)s)")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FILE",
        help="images to work on: .npy, or .npz with image and label, or a folder of .png files (which "
        "takes Pillow); samples of a model when left out",
    )
    parser.add_argument("--source", default="", metavar="MODEL", help="which model's samples those are")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same picture (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path(picture), help="the picture (%(default)s)")
    return parser


def served(client: samovar.Client, suits: Callable[[samovar.Model], bool], what: str) -> list[samovar.Model]:
    """The default versions of image models that suit; ends the program when there is none."""
    found = [
        each for each in client.models() if each.is_default and each.value.kind == "image" and suits(each)
    ]
    return found or _end(f"no model of images here {what}; `samovar models` lists what there is")


def alike(models: Sequence[samovar.Model]) -> list[samovar.Model]:
    """Those whose rows are such as the first one's."""
    return [each for each in models if _rows_of(each) == _rows_of(models[0])]


def has_inputs(operation: samovar.Operation, *names: str) -> bool:
    """Whether an operation takes inputs of these names, needed or not."""
    return set(names) <= {each.tensor.name for each in operation.inputs}


def encodes(model: samovar.Model) -> bool:
    """Whether what encode answers is what decode asks for."""
    if not {"encode", "decode"} <= set(model.operations):
        return False
    needed = [each.tensor.shape for each in model.operations["decode"].inputs if not each.optional]
    return needed == [model.operations["encode"].outputs[0].shape]


def judges(client: samovar.Client, model: samovar.Model) -> list[samovar.Model]:
    """The classifiers of such rows into such classes."""
    every = [each for each in client.models() if each.is_default and "classify" in each.operations]
    labels = model.value.class_labels
    return [each for each in alike([model, *every])[1:] if each.value.class_labels == labels]


def load(
    client: samovar.Client,
    model: samovar.Model,
    options: argparse.Namespace,
    count: int,
    labelled: bool = False,
) -> Images:
    """So many images for a model: a file's in an order drawn by seed, or samples, the classes in turn."""
    if options.images:
        return _read(model, options, count, labelled)
    sources = served(client, lambda each: _can_draw(each, model, labelled, options.source), "draws such rows")
    source = next((each for each in sources if each.name != model.name), sources[0])
    classes = len(source.value.class_labels)
    asks = classes and has_inputs(source.operations["sample"], "label")
    labels = np.arange(count) % classes if asks else np.full(count, -1)
    inputs = {"label": labels} if asks else {}
    rows = client.sample(source.name, count, seed=options.seed + 1, inputs=inputs).value
    return Images(rows, labels, f"samples of {source.name}")


def save(path: Path, lines: Sequence[Rows], model: samovar.Model) -> None:
    """Lines of equally many images, one below the other, as a .png."""
    low = model.value.tensor.minimum or 0
    high = model.value.tensor.maximum or max(model.value.levels - 1, 1)
    path.write_bytes(png.grid(png.levels(np.concatenate(lines), low, high), columns=len(lines[0])))
    print(f"wrote {path}")


def _can_draw(source: samovar.Model, model: samovar.Model, labelled: bool, name: str) -> bool:
    usual = source.operations.get("sample")
    if usual is None or any(not each.optional for each in usual.inputs) or name not in ("", source.name):
        return False
    classes = source.value.class_labels == model.value.class_labels and has_inputs(usual, "label")
    return _rows_of(source) == _rows_of(model) and (classes or not labelled)


def _rows_of(model: samovar.Model) -> tuple[object, ...]:
    return model.value.tensor.dtype, model.value.tensor.shape, model.value.levels


def _read(model: samovar.Model, options: argparse.Namespace, count: int, labelled: bool) -> Images:
    content = _pngs(options.images) if options.images.is_dir() else files.read(options.images)
    named = content if isinstance(content, dict) else {"image": content}
    rows, shape = named.get("image", np.zeros(0)), model.value.tensor.shape
    if rows.shape[1:] != shape or not len(rows):
        _end(f"{options.images}: expected images [N, {', '.join(map(str, shape))}], got {list(rows.shape)}")
    if labelled and "label" not in named:
        _end(f"{options.images}: expected .npz with image and label, for classes are needed")
    if len(rows) < count:
        asked = f"expected {count} images at least, got {len(rows)}"
        _end(f"{options.images}: {asked}; --help says what asks for fewer")
    chosen = np.random.default_rng(options.seed).permutation(len(rows))[:count]
    labels = np.asarray(named.get("label", np.full(len(rows), -1)))
    return Images(rows[chosen], labels[chosen], str(options.images))


def _pngs(folder: Path) -> Rows:
    from PIL import Image

    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def run(recipe: Callable[[], None]) -> None:
    """Run a recipe; what goes wrong is one line."""
    try:
        recipe()
    except (samovar.SamovarError, files.UnsuitableFile) as error:
        _end(str(error))


def _end(message: str) -> Any:
    raise SystemExit(message)

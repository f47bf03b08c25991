"""Hide a part of some images and let every model that can fill it in; save all answers in one picture.

python inpaint.py                                       # every model that takes known pixels
python inpaint.py --hide right --images mine.npy        # images of your own
python inpaint.py digits-pixelcnn --hide middle

What can: any way to `sample` that takes an image and a mask `known`. How near an answer is to a draw from
the model given what is known differs: each way says below whether it is exact or approximate, and when.
The error is the mean difference from what was hidden, in levels. No model aims at a small one, for there is
more than one way to go on; it tells those that heed what is known from those that do not.
"""

import argparse

import numpy as np
import pictures

import samovar


def main() -> None:
    options = _parser().parse_args()
    with samovar.Client(options.address, timeout=None) as client:
        models = pictures.served(client, lambda each: _suits(each, options.models), "takes known pixels")
        models = pictures.alike(models)
        images = pictures.load(client, models[0], options, options.count)
        known = _mask(images.rows, options.hide)
        lines = [images.rows, images.rows * known]
        print(f"line 1: {images.origin}\nline 2: the same, the {options.hide} part hidden")
        for model in models:
            for way in filter(_fills, model.operations.values()):
                filled = _fill(client, model, way, images.rows, known, options)
                assert (filled == images.rows)[known == 1].all(), "what is known stays"
                lines.append(filled)
                error = np.abs(filled.astype(float) - images.rows)[known == 0].mean()
                print(f"line {len(lines)}: {model.name}, {way.name}: error {error:.2f}\n    {_said(way)}")
    pictures.save(options.output, lines, models[0])


def _fill(
    client: samovar.Client,
    model: samovar.Model,
    way: samovar.Operation,
    images: np.ndarray,
    known: np.ndarray,
    options: argparse.Namespace,
) -> np.ndarray:
    # What is hidden is not sent.
    inputs = {model.value.tensor.name: images * known, "known": known}
    return client.sample(model.name, len(images), inputs=inputs, seed=options.seed, method=way.method).value


def _said(way: samovar.Operation) -> str:
    """What the model's description says of the answer's truth."""
    known = next(each.tensor.doc for each in way.inputs if each.tensor.name == "known")
    return f"{way.doc} Known: {known}."


def _mask(images: np.ndarray, hide: str) -> np.ndarray:
    known = np.ones_like(images)
    height, width = (size // 4 for size in images.shape[1:3])
    hidden = {
        "lower": np.s_[:, 2 * height :],
        "right": np.s_[:, :, 2 * width :],
        "middle": np.s_[:, height:-height, width:-width],
    }
    known[hidden[hide]] = 0
    return known


def _fills(way: samovar.Operation) -> bool:
    return way.name.startswith("sample") and pictures.has_inputs(way, "known")


def _suits(model: samovar.Model, names: list[str]) -> bool:
    return any(map(_fills, model.operations.values())) and (not names or model.name in names)


def _parser() -> argparse.ArgumentParser:
    parser = pictures.parser(__doc__, "inpaint.png")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these (default: all that can)")
    parser.add_argument("--count", type=int, default=10, help="how many images (%(default)s)")
    parser.add_argument(
        "--hide", choices=("lower", "right", "middle"), default="lower", help="which part (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    pictures.run(main)

"""Hide a part of some images, inpaint it with each model that can, and save the results as a grid.

python inpaint.py                                       # all models that take known pixels
python inpaint.py --hide right --images mine.npy        # images of a file
python inpaint.py digits-pixelcnn --hide middle

The recipe uses each `sample` operation, and each of its variants, with an input image and a mask `known`.
Some of them sample exactly from the model's distribution given the known pixels, others approximately; the
output states which. The error is the mean absolute difference from the hidden pixels, in levels. It shows
whether a model uses the known pixels. Lower is not always better: more than one image fits the known pixels.
"""

import argparse

import numpy as np
import recipe_utils as utils

import samovar


def main() -> None:
    options = _build_parser().parse_args()
    with samovar.Client(options.address, timeout=None) as client:
        models = utils.with_same_rows(
            utils.find_models(client, lambda model: _is_suitable(model, options.models), "takes known pixels")
        )
        images = utils.load_images(client, models[0], options, options.count)
        known = _known_mask(images.rows, options.hide)
        grid = [images.rows, images.rows * known]
        print(f"grid row 1: {images.source}\ngrid row 2: the same with the {options.hide} part hidden")
        for model in models:
            for operation in filter(_can_inpaint, model.operations.values()):
                inpainted = _inpaint(client, model, operation, images.rows, known, options.seed)
                assert (inpainted == images.rows)[known == 1].all(), "known pixels must not change"
                grid.append(inpainted)
                error = np.abs(inpainted.astype(float) - images.rows)[known == 0].mean()
                print(f"grid row {len(grid)}: {model.name}, {operation.name}: error {error:.2f}")
                print(f"    {_describe(operation)}")
    utils.save_grid(options.output, grid, models[0])


def _inpaint(
    client: samovar.Client,
    model: samovar.Model,
    operation: samovar.Operation,
    images: np.ndarray,
    known: np.ndarray,
    seed: int,
) -> np.ndarray:
    # Multiply by the mask, so that the server does not receive the hidden pixels.
    inputs = {model.data_spec.tensor.name: images * known, "known": known}
    return client.sample(model.name, len(images), inputs=inputs, seed=seed, variant=operation.variant).value


def _describe(operation: samovar.Operation) -> str:
    known = next(input_.tensor.doc for input_ in operation.inputs if input_.tensor.name == "known")
    return f"{operation.doc} Known: {known}."


def _known_mask(images: np.ndarray, hidden_part: str) -> np.ndarray:
    """Return a mask like the images: 1 where a pixel is known, 0 where it is hidden."""
    height, width = (size // 4 for size in images.shape[1:3])
    hidden = {
        "lower": np.s_[:, 2 * height :],
        "right": np.s_[:, :, 2 * width :],
        "middle": np.s_[:, height:-height, width:-width],
    }
    known = np.ones_like(images)
    known[hidden[hidden_part]] = 0
    return known


def _can_inpaint(operation: samovar.Operation) -> bool:
    return operation.name.startswith("sample") and utils.has_inputs(operation, "known")


def _is_suitable(model: samovar.Model, names: list[str]) -> bool:
    return any(map(_can_inpaint, model.operations.values())) and (not names or model.name in names)


def _build_parser() -> argparse.ArgumentParser:
    parser = utils.build_parser(__doc__, "inpaint.png")
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="models to use (default: all that inpaint)"
    )
    utils.add_number(parser, "--count", 10, "number of images")
    hide_help = "part of each image to hide (default: %(default)s)"
    parser.add_argument("--hide", choices=("lower", "right", "middle"), default="lower", help=hide_help)
    return parser


if __name__ == "__main__":
    utils.run_recipe(main)

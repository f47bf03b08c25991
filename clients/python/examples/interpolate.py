"""Interpolate between images in the latent space of each model that decodes, and save the steps as a grid.

python interpolate.py                                   # all image models that decode
python interpolate.py digits-vae --images mine.npy      # between images of a file

Models that encode interpolate between images. Others, such as GANs, interpolate between random latents; if
they have classes, both ends have the same class. The path is a straight line between the means of an encoder,
and a great circle (slerp; White, 2016) between latents that follow a normal distribution. --path overrides
this choice.
"""

import argparse

import numpy as np
import recipe_utils as utils

import samovar
from samovar import latent


def main() -> None:
    options = _build_parser().parse_args()
    with samovar.Client(options.address, timeout=None) as client:
        models = utils.with_same_rows(
            utils.find_models(client, lambda model: _is_suitable(model, options.models), "decodes")
        )
        encoders = [model for model in models if utils.can_round_trip(model)]
        num_images = 2 * options.walks
        images = utils.load_images(client, encoders[0], options, num_images) if encoders else None
        grid: list[np.ndarray] = []
        for model in models:
            if images is not None and model in encoders:
                source, ends = images.source, images.rows
            else:
                source, ends = "random latents", options.seed + np.arange(num_images)
            print(f"grid rows {len(grid) + 1} to {len(grid) + options.walks}: {model.name}, between {source}")
            for walk in range(options.walks):
                grid.append(_interpolate(client, model, ends[2 * walk : 2 * walk + 2], walk, options))
    utils.save_grid(options.output, grid, models[0])


def _interpolate(
    client: samovar.Client, model: samovar.Model, ends: np.ndarray, walk: int, options: argparse.Namespace
) -> np.ndarray:
    """Return images [steps, *shape] between two images [2, *shape] or two seeds [2]."""
    num_classes = len(model.data_spec.class_labels)
    takes_label = num_classes and utils.has_inputs(model.operations["decode"], "label")
    inputs = {"label": walk % num_classes} if takes_label and not utils.can_round_trip(model) else {}
    return latent.interpolate(
        client, model.name, *ends, count=options.steps, path=options.path, seed=options.seed, inputs=inputs
    )


def _is_suitable(model: samovar.Model, names: list[str]) -> bool:
    return "decode" in model.operations and (not names or model.name in names)


def _build_parser() -> argparse.ArgumentParser:
    parser = utils.build_parser(__doc__, "interpolate.png")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models to use (default: all that decode)")
    utils.add_number(parser, "--walks", 4, "number of interpolations per model")
    utils.add_number(parser, "--steps", 10, "images per interpolation, both ends included")
    path_help = "straight line or great circle (default: depends on the model)"
    parser.add_argument("--path", choices=("lerp", "slerp"), help=path_help)
    return parser


if __name__ == "__main__":
    utils.run_recipe(main)

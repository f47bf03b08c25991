"""Walk between two images in the latent space of every model that decodes, and save the steps as a strip.

python interpolate.py                                   # every model of images that decodes
python interpolate.py digits-vae --images mine.npy      # between images of your own

A model that encodes walks between images; another one, such as a GAN, between draws of its latent, all
of one class where it takes a label. A walk is straight between an encoder's means, and follows a great
circle where latents lie like draws from a normal distribution (White, 2016); --path says otherwise.
"""

import argparse

import numpy as np
import pictures

import samovar
from samovar import latent


def main() -> None:
    options = _parser().parse_args()
    with samovar.Client(options.address, timeout=None) as client:
        models = pictures.alike(pictures.served(client, lambda each: _suits(each, options.models), "decodes"))
        encoding = [model for model in models if pictures.encodes(model)]
        images = pictures.load(client, encoding[0], options, 2 * options.walks) if encoding else None
        lines = []
        for model in models:
            between = f"{images.origin}" if images and pictures.encodes(model) else "draws"
            print(f"lines {len(lines) + 1} to {len(lines) + options.walks}: {model.name}, between {between}")
            for walk in range(options.walks):
                ends = (
                    images.rows[2 * walk : 2 * walk + 2]
                    if images and pictures.encodes(model)
                    else _seeds(walk, options)
                )
                lines.append(_walk(client, model, ends, walk, options))
    pictures.save(options.output, lines, models[0])


def _walk(
    client: samovar.Client, model: samovar.Model, ends: np.ndarray, walk: int, options: argparse.Namespace
) -> np.ndarray:
    classes = len(model.value.class_labels)
    asks = (
        classes and not pictures.encodes(model) and pictures.has_inputs(model.operations["decode"], "label")
    )
    inputs = {"label": walk % classes} if asks else {}
    return latent.interpolate(
        client, model.name, *ends, count=options.steps, path=options.path, seed=options.seed, inputs=inputs
    )


def _seeds(walk: int, options: argparse.Namespace) -> np.ndarray:
    return options.seed + np.array([2 * walk, 2 * walk + 1])


def _suits(model: samovar.Model, names: list[str]) -> bool:
    return "decode" in model.operations and (not names or model.name in names)


def _parser() -> argparse.ArgumentParser:
    parser = pictures.parser(__doc__, "interpolate.png")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these (default: all that decode)")
    parser.add_argument("--walks", type=int, default=4, help="how many of each model (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="images on a walk, ends included (%(default)s)")
    parser.add_argument("--path", choices=("lerp", "slerp"), help="straight, or along a great circle")
    return parser


if __name__ == "__main__":
    pictures.run(main)

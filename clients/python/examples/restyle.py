"""Change images of one class into images of another class, and keep what the classes have in common.

python restyle.py --from 3 --to 8                       # names of classes
python restyle.py digits-diffusion --from 4 --to 9 --images mine.npz

A model with `sample:edit` adds noise to an image and denoises it as an image of the new class (SDEdit, Meng
et al., 2022): more noise gives more of the new class and less of the image. Other models encode the image,
add the difference of the mean latents of both classes, an attribute vector (Larsen et al., 2016), and decode
it. The first row of the grid has the original images, each further row one amount of change. If the server
has a classifier, the output states how many images of each row it assigns to the new class.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import recipe_utils as utils

import samovar
from samovar import latent


@dataclass(frozen=True)
class Restyler:
    """A change of images [N, *shape] to another class. `examples` are images of the new and the old class."""

    client: samovar.Client
    model: samovar.Model
    images: np.ndarray
    examples: tuple[np.ndarray, np.ndarray]
    label: int
    seed: int

    def apply(self, amount: float) -> np.ndarray:
        """Return the images changed by `amount`, 0 to 1."""
        if "sample:edit" not in self.model.operations:
            direction = latent.attribute(self.client, self.model.name, *self.examples)
            return latent.edit(self.client, self.model.name, self.images, direction, amount)
        count, parameters = len(self.images), {"strength": amount}
        inputs = {self.model.data_spec.tensor.name: self.images, "label": np.full(count, self.label)}
        options = {"seed": self.seed, "variant": "edit", "parameters": parameters}
        return self.client.sample(self.model.name, count, inputs=inputs, **options).value


def main() -> None:
    options = _build_parser().parse_args()
    with samovar.Client(options.address, timeout=None) as client:
        requirement = "edits images or latents"
        models = utils.find_models(client, lambda model: _is_suitable(model, options.model), requirement)
        model = next((model for model in models if "sample:edit" in model.operations), models[0])
        old, new = (_class_index(model, name) for name in (options.old, options.new))
        images = utils.load_images(client, model, options, options.examples, needs_labels=True)
        positives, negatives = (images.rows[images.labels == label] for label in (new, old))
        if not len(positives) or not len(negatives):
            raise SystemExit(f"{images.source}: expected images of both classes among {len(images.rows)}")
        originals = negatives[: options.count]
        restyler = Restyler(client, model, originals, (positives, negatives), new, options.seed)
        grid = [originals, *map(restyler.apply, options.amounts)]
        for row, amount in zip(grid, (0, *options.amounts), strict=True):
            print(f"{model.name}, changed by {amount:g}{_classify(client, model, row, new)}")
    utils.save_grid(options.output, grid, model)


def _classify(client: samovar.Client, model: samovar.Model, images: np.ndarray, label: int) -> str:
    shares = []
    for classifier in utils.find_classifiers(client, model):
        predicted = client.classify(classifier.name, images).value.argmax(axis=1)
        shares.append(f"{(predicted == label).mean():.0%} by {classifier.name}")
    return f": classified as {model.data_spec.class_labels[label]}: {', '.join(shares)}" if shares else ""


def _class_index(model: samovar.Model, name: str) -> int:
    class_labels = model.data_spec.class_labels
    if name not in class_labels:
        known = ", ".join(class_labels)
        raise SystemExit(f"unknown class {name!r} of {model.name}; expected one of: {known}")
    return class_labels.index(name)


def _is_suitable(model: samovar.Model, name: str) -> bool:
    can_edit = "sample:edit" in model.operations or utils.can_round_trip(model)
    return can_edit and bool(model.data_spec.class_labels) and name in ("", model.name)


def _build_parser() -> argparse.ArgumentParser:
    parser = utils.build_parser(__doc__, "restyle.png")
    utils.add_model(parser)
    parser.add_argument("--from", dest="old", required=True, metavar="CLASS", help="class of the originals")
    parser.add_argument("--to", dest="new", required=True, metavar="CLASS", help="class of the results")
    utils.add_number(parser, "--count", 10, "number of images to change")
    utils.add_number(parser, "--examples", 400, "number of images of all classes")
    amounts = {"type": float, "nargs": "+", "default": [0.25, 0.5, 0.75, 1.0]}
    parser.add_argument("--amounts", **amounts, help="amounts of change, 0 to 1 (default: %(default)s)")
    return parser


if __name__ == "__main__":
    utils.run_recipe(main)

"""Make images of one class into images of another, keeping what the two have in common.

python restyle.py --from 3 --to 8                       # classes by name
python restyle.py digits-diffusion --from 4 --to 9 --images mine.npz

Two ways, whichever the model has. `sample:edit` covers an image with noise and denoises it as one of the
new class (SDEdit, Meng et al., 2022): the more noise, the more of the class and the less of the image. A
model that only encodes and decodes adds the difference of the classes' mean latents, an attribute vector
(Larsen et al., 2016). The picture has the originals in its first line, and more of the change in every
further one. Where a classifier is served, it says how many of a line it takes for the new class.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import pictures

import samovar
from samovar import latent


@dataclass(frozen=True)
class Change:
    """From one class to another; `taught` holds rows of either, from which a direction is learned."""

    client: samovar.Client
    model: samovar.Model
    rows: np.ndarray
    taught: tuple[np.ndarray, np.ndarray]
    label: int
    seed: int

    def by(self, amount: float) -> np.ndarray:
        """The rows changed by so much."""
        return self._denoised(amount) if "sample:edit" in self.model.operations else self._moved(amount)

    def _denoised(self, amount: float) -> np.ndarray:
        inputs = {self.model.value.tensor.name: self.rows, "label": np.full(len(self.rows), self.label)}
        options = {"seed": self.seed, "method": "edit", "parameters": {"strength": amount}}
        return self.client.sample(self.model.name, len(self.rows), inputs=inputs, **options).value

    def _moved(self, amount: float) -> np.ndarray:
        direction = latent.attribute(self.client, self.model.name, *self.taught)
        return latent.edit(self.client, self.model.name, self.rows, direction, amount)


def main() -> None:
    options = _parser().parse_args()
    with samovar.Client(options.address, timeout=None) as client:
        models = pictures.served(client, lambda each: _suits(each, options.model), "edits images or codes")
        model = next((each for each in models if "sample:edit" in each.operations), models[0])
        old, new = (_number(model, name) for name in (options.old, options.new))
        images = pictures.load(client, model, options, options.taught, labelled=True)
        having, lacking = (images.rows[images.labels == label] for label in (new, old))
        if not len(having) or not len(lacking):
            raise SystemExit(f"{images.origin}: expected images of both classes among {len(images.rows)}")
        change = Change(client, model, lacking[: options.count], (having, lacking), new, options.seed)
        lines = [change.rows, *map(change.by, options.amounts)]
        for line, amount in zip(lines, (0, *options.amounts), strict=True):
            print(f"{model.name}, changed by {amount:g}{_seen(client, model, line, new)}")
    pictures.save(options.output, lines, model)


def _seen(client: samovar.Client, model: samovar.Model, rows: np.ndarray, label: int) -> str:
    seen = [
        f"{(client.classify(judge.name, rows).value.argmax(1) == label).mean():.0%} by {judge.name}"
        for judge in pictures.judges(client, model)
    ]
    return f": taken for {model.value.class_labels[label]}: {', '.join(seen)}" if seen else ""


def _number(model: samovar.Model, name: str) -> int:
    classes = model.value.class_labels
    if name not in classes:
        raise SystemExit(f"expected a class of {model.name}: {', '.join(classes)}; got {name!r}")
    return classes.index(name)


def _suits(model: samovar.Model, name: str) -> bool:
    able = "sample:edit" in model.operations or pictures.encodes(model)
    return able and bool(model.value.class_labels) and name in ("", model.name)


def _parser() -> argparse.ArgumentParser:
    parser = pictures.parser(__doc__, "restyle.png")
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="default: the first that can")
    parser.add_argument("--from", dest="old", required=True, metavar="CLASS", help="which images to change")
    parser.add_argument("--to", dest="new", required=True, metavar="CLASS", help="into what")
    parser.add_argument("--count", type=int, default=10, help="how many to change (%(default)s)")
    parser.add_argument("--taught", type=int, default=400, help="images of all classes (%(default)s)")
    parser.add_argument(
        "--amounts", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="how much (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    pictures.run(main)

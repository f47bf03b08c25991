"""Do a model's images teach a classifier? Train it on generated images, test it on real ones.

python augment.py --images digits.npz                        # real images and their classes
python augment.py digits-diffusion --method edit --strength 0.3
python augment.py --real 50 --generated 2000                 # few real ones: where augmentation may help

The classification accuracy score of Ravuri & Vinyals (2019): the accuracy on real images of a classifier that
saw generated ones only. Beside it that of real ones, and of both together, which is what augmentation is for.
The classifier takes the vote of the 5 nearest images in pixels. Images are made class by class; with --method
edit each is made from a real one of its class, changed by as much as --strength says. Give images that the
model was not trained on. ± is one standard error over the test images; they are the same for all three.
"""

import argparse

import numpy as np
import pictures

import samovar

NEIGHBOURS = 5


def main() -> None:
    options = _parser().parse_args()
    with samovar.Client(options.address, timeout=None) as client:
        model = pictures.served(client, lambda each: _suits(each, options), "draws by class in that way")[0]
        images = pictures.load(client, model, options, options.real + options.test, labelled=True)
        if not options.images:
            print(f"No --images: {images.origin} stand for real ones, so this shows the recipe and no more.")
        real, test = images[: options.real], images[options.real :]
        made = _generate(client, model, real, options)
        _judge(client, model, made)
    both = np.concatenate([real.rows, made.rows]), np.concatenate([real.labels, made.labels])
    teachers = {"real only": real, "generated only": made, "both": pictures.Images(*both, "both")}
    for name, taught in teachers.items():
        print(f"{name:<16} {len(taught.rows):6} images, {_share(_vote(taught, test.rows) == test.labels)}")
    classes = [made.rows[made.labels == label] for label in np.unique(made.labels)]
    pictures.save(options.output, [rows[: min(10, *map(len, classes))] for rows in classes], model)


def _generate(
    client: samovar.Client, model: samovar.Model, real: pictures.Images, options: argparse.Namespace
) -> pictures.Images:
    count, inputs, parameters = options.generated, {}, {}
    if options.method:
        chosen = np.arange(count) % len(real.rows)
        labels, inputs[model.value.tensor.name] = real.labels[chosen], real.rows[chosen]
        parameters["strength"] = options.strength
    else:
        labels = np.arange(count) % len(model.value.class_labels)
    settings = {"seed": options.seed, "method": options.method, "parameters": parameters}
    made = client.sample(model.name, count, inputs={"label": labels, **inputs}, **settings).value
    print(f"{count} images of {model.name}, seed {options.seed}")
    return pictures.Images(made, labels, model.name)


def _judge(client: samovar.Client, model: samovar.Model, made: pictures.Images) -> None:
    """Whether served classifiers see the classes that were asked for."""
    for judge in pictures.judges(client, model):
        seen = client.classify(judge.name, made.rows).value.argmax(axis=1)
        print(f"{judge.name} sees the class that was asked for: {_share(seen == made.labels)}")


def _vote(taught: pictures.Images, test: np.ndarray) -> np.ndarray:
    """The commonest class among the nearest rows of each test row; of equally common ones, the first."""
    known, asked = (each.reshape(len(each), -1).astype(np.float32) for each in (taught.rows, test))
    distances = (known**2).sum(1) - 2 * asked @ known.T
    nearest = taught.labels[distances.argsort(axis=1)[:, :NEIGHBOURS]]
    return np.array([np.bincount(each).argmax() for each in nearest])


def _share(hits: np.ndarray) -> str:
    return f"accuracy {hits.mean():.3f} ± {hits.std() / len(hits) ** 0.5:.3f}"


def _suits(model: samovar.Model, options: argparse.Namespace) -> bool:
    way = model.operations.get(f"sample:{options.method}" if options.method else "sample")
    return way is not None and pictures.has_inputs(way, "label") and options.model in ("", model.name)


def _parser() -> argparse.ArgumentParser:
    parser = pictures.parser(__doc__, "augment.png")
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="whose images to learn from")
    parser.add_argument("--method", choices=("", "edit"), default="", help="from noise, or from real images")
    parser.add_argument("--strength", type=float, default=0.3, help="of an edit, 0 to 1 (%(default)s)")
    parser.add_argument("--real", type=int, default=200, help="real images to learn from (%(default)s)")
    parser.add_argument("--test", type=int, default=400, help="real images to test on (%(default)s)")
    parser.add_argument("--generated", type=int, default=1000, help="images to generate (%(default)s)")
    return parser


if __name__ == "__main__":
    pictures.run(main)

"""Train a classifier on generated images, on real ones and on both, and test it on other real images.

python augment.py --images digits.npz                        # real images and their classes
python augment.py digits-diffusion --variant edit --strength 0.3
python augment.py --real 50 --generated 2000                 # few real images: augmentation may help

The accuracy after training on generated images alone is the classification accuracy score of Ravuri and
Vinyals (2019). The classifier is the majority vote of the 5 nearest neighbors in pixel space. With --variant
edit, each generated image is a real image of the same class, changed by --strength. Use images that are not
in the model's training set. ± is one standard error over the test images; all three classifiers see the same
ones.
"""

import argparse

import numpy as np
import recipe_utils as utils

import samovar

NUM_NEIGHBORS = 5


def main() -> None:
    options = _build_parser().parse_args()
    with samovar.Client(options.address, timeout=None) as client:
        requirement = "samples by class in this way"
        models = utils.find_models(client, lambda model: _is_suitable(model, options), requirement)
        model, count = models[0], options.real + options.test
        images = utils.load_images(client, model, options, count, needs_labels=True)
        if not options.images:
            print(f"No --images: {images.source} replace real images. The result only shows the recipe.")
        real, test = images[: options.real], images[options.real :]
        generated = _generate(client, model, real, options)
        for classifier in utils.find_classifiers(client, model):
            predicted = client.classify(classifier.name, generated.rows).value.argmax(axis=1)
            accuracy = _accuracy(predicted == generated.labels)
            print(f"{classifier.name} predicts the requested class: {accuracy}")
    rows = np.concatenate([real.rows, generated.rows])
    both = utils.Images(rows, np.concatenate([real.labels, generated.labels]), "both")
    for name, train in {"real only": real, "generated only": generated, "both": both}.items():
        hits = _classify(train, test.rows) == test.labels
        print(f"{name:<16} {len(train.rows):6} images, {_accuracy(hits)}")
    by_class = [generated.rows[generated.labels == label] for label in np.unique(generated.labels)]
    num_columns = min(10, *map(len, by_class))
    utils.save_grid(options.output, [rows[:num_columns] for rows in by_class], model)


def _generate(
    client: samovar.Client, model: samovar.Model, real: utils.Images, options: argparse.Namespace
) -> utils.Images:
    """Return generated images with the classes in rotation, or edited copies of the real images."""
    count, inputs, parameters = options.generated, {}, {}
    if options.variant:
        indices = np.arange(count) % len(real.rows)
        labels, inputs[model.data_spec.tensor.name] = real.labels[indices], real.rows[indices]
        parameters["strength"] = options.strength
    else:
        labels = np.arange(count) % len(model.data_spec.class_labels)
    settings = {"seed": options.seed, "variant": options.variant, "parameters": parameters}
    rows = client.sample(model.name, count, inputs={"label": labels, **inputs}, **settings).value
    print(f"{count} images of {model.name}, seed {options.seed}")
    return utils.Images(rows, labels, model.name)


def _classify(train: utils.Images, test: np.ndarray) -> np.ndarray:
    """Return the most common class of the nearest training images; in a tie, the lowest class index."""
    references, queries = (rows.reshape(len(rows), -1).astype(np.float32) for rows in (train.rows, test))
    # The squared distance without the term that is the same for all references.
    distances = (references**2).sum(1) - 2 * queries @ references.T
    nearest = train.labels[distances.argsort(axis=1)[:, :NUM_NEIGHBORS]]
    return np.array([np.bincount(labels).argmax() for labels in nearest])


def _accuracy(hits: np.ndarray) -> str:
    return f"accuracy {hits.mean():.3f} ± {hits.std() / len(hits) ** 0.5:.3f}"


def _is_suitable(model: samovar.Model, options: argparse.Namespace) -> bool:
    operation = model.operations.get(f"sample:{options.variant}" if options.variant else "sample")
    takes_label = operation is not None and utils.has_inputs(operation, "label")
    return takes_label and options.model in ("", model.name)


def _build_parser() -> argparse.ArgumentParser:
    parser = utils.build_parser(__doc__, "augment.png")
    utils.add_model(parser)
    variant_help = "edit: change real images (default: sample from noise)"
    parser.add_argument("--variant", choices=("", "edit"), default="", help=variant_help)
    utils.add_number(parser, "--strength", 0.3, "strength of an edit, 0 to 1")
    utils.add_number(parser, "--real", 200, "number of real training images")
    utils.add_number(parser, "--test", 400, "number of real test images")
    utils.add_number(parser, "--generated", 1000, "number of generated images")
    return parser


if __name__ == "__main__":
    utils.run_recipe(main)

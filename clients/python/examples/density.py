"""Score samples of a model, and copies of them with shuffled elements, with the same model.

python density.py                       # all models that sample and score
python density.py digits-vae            # one model
"""

import sys

import numpy as np

import samovar


def main(*names: str) -> None:
    with samovar.Client() as client:
        for model in client.models():
            if {"sample", "score"} <= set(model.operations) and (not names or model.name in names):
                compare_scores(client, model)


def compare_scores(client: samovar.Client, model: samovar.Model, num_rows: int = 16) -> None:
    samples = client.sample(model.name, num_rows, seed=0, version=model.version).value
    flat = samples.reshape(num_rows, -1)
    shuffled = np.random.default_rng(0).permuted(flat, axis=1).reshape(samples.shape)
    print(f"{model.name} {model.version}")
    for name, rows in (("samples", samples), ("shuffled samples", shuffled)):
        scores = client.score(model.name, rows, seed=0, version=model.version)
        mean, error = scores.nats.mean(), scores.nats.std(ddof=1) / num_rows**0.5
        print(f"  {name:16} {mean:10.2f} ± {error:.2f} nats ({scores.kind}, {scores.coordinate_space})")


if __name__ == "__main__":
    main(*sys.argv[1:])

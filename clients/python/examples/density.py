"""Score a model's own samples beside noise: which does it find likelier, and what is the number?

python density.py                       # every model that can both sample and score
python density.py digits-vae            # this one
"""

import sys

import numpy as np

import samovar


def main(*names: str) -> None:
    with samovar.Client() as client:
        for model in client.models():
            if {"sample", "score"} <= set(model.operations) and (not names or model.name in names):
                compare(client, model)


def compare(client: samovar.Client, model: samovar.Model, rows: int = 16) -> None:
    drawn = client.sample(model.name, rows, seed=0, version=model.version).value
    shuffled = np.random.default_rng(0).permuted(drawn.reshape(rows, -1), axis=1).reshape(drawn.shape)
    print(f"{model.name} {model.version}")
    for what, values in (("samples", drawn), ("the same, elements shuffled", shuffled)):
        scores = client.score(model.name, values, seed=0, version=model.version)
        error = scores.nats.std(ddof=1) / rows**0.5
        print(f"  {what:28} {scores.nats.mean():10.2f} ± {error:.2f} nats ({scores.kind}, {scores.space})")


if __name__ == "__main__":
    main(*sys.argv[1:])

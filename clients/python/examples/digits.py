"""Sample images from a model and save them as a grid.

python digits.py                        # the first image model that samples
python digits.py digits-vae 7           # one model, with seed 7
"""

import sys
from pathlib import Path

import samovar
from samovar import png


def main(name: str = "", seed: int | None = None) -> None:
    with samovar.Client() as client:
        models = [model for model in client.models() if model.data_spec.kind == "image"]
        name = name or next(model.name for model in models if "sample" in model.operations)
        model = client.model(name)
        result = client.sample(name, 64, seed=seed)
    levels = png.levels(result.value, low=0, high=model.data_spec.num_levels - 1)
    Path("digits.png").write_bytes(png.grid(levels))
    print(f"digits.png: 64 rows of {name} {result.run.version}, seed {result.run.seed}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))

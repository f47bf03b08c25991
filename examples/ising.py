"""The Ising model on a torus: neighboring spins tend to agree; each row has its own temperature.

A sweep of the Gibbs sampler (Geman & Geman 1984) redraws each spin given its four neighbors: first the black
squares of a checkerboard, then the white ones.
"""

import torch
from torch import Tensor

from export.custom_model import (
    DataSpec,
    Input,
    Model,
    Noise,
    Parameter,
    Program,
    Score,
    Steps,
    TensorSpec,
    module,
)

SIZE = 32
SHAPE = (SIZE, SIZE)
BLACK = (torch.arange(SIZE) + torch.arange(SIZE).unsqueeze(1)) % 2 == 0
IMAGE = TensorSpec("image", "uint8", SHAPE, minimum=0, maximum=1, doc="1 where the spin is up")
SPINS = TensorSpec("spins", shape=SHAPE, doc="+1 up, -1 down")
ENERGY = TensorSpec("energy", doc="sum over neighbor pairs: -1 if they agree, +1 if not")
LOG_WEIGHT = TensorSpec("log_weight", doc="-energy / temperature, in nats, up to the partition function")
TEMPERATURE = Parameter("temperature", "float", 2.27, 0.1, 100, doc="2.269 is critical")
SWEEPS = Parameter("sweeps", "integer", 100, 1, 10_000, doc="more sweeps are closer to equilibrium")
NOISE = (Noise("coins", "uniform", SHAPE, stream=0), Noise("uniform", "uniform", SHAPE, stream=1))


@module
def start(coins: Tensor) -> Tensor:
    return torch.where(coins < 0.5, 1.0, -1.0)


@module
def sweep(spins: Tensor, uniform: Tensor, temperature: Tensor) -> Tensor:
    for squares in (BLACK, ~BLACK):
        field = spins.roll(1, 1) + spins.roll(-1, 1) + spins.roll(1, 2) + spins.roll(-1, 2)
        p_up = torch.sigmoid(2 * field / temperature.reshape(-1, 1, 1))
        spins = torch.where(squares, torch.where(uniform < p_up, 1.0, -1.0), spins)
    return spins


@module
def to_image(spins: Tensor) -> Tensor:
    return (spins > 0).to(torch.uint8)


@module
def energy(image: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    spins = 2 * image.to(torch.float32) - 1
    total = -(spins * (spins.roll(1, 1) + spins.roll(1, 2))).sum((1, 2))
    return total, -total / temperature


SAMPLE = Program("sample", to_image, (IMAGE,), "Sweep random spins.", init=start, step=sweep,
    state=(SPINS,), steps=Steps(parameter="sweeps"), parameters=(TEMPERATURE, SWEEPS), noise=NOISE,
    previewable=True)  # fmt: skip
WEIGHT = Program("energy", energy, (ENERGY, LOG_WEIGHT), "Compute the energy.", inputs=(Input(IMAGE),),
    parameters=(TEMPERATURE,), score=Score("unnormalized", SIZE**2, "spins", "log_weight"))  # fmt: skip
MODEL = Model(DataSpec("image", IMAGE, num_levels=2), (SAMPLE, WEIGHT))

"""A spiral galaxy: normally distributed points, wound around the center, with an exact density."""

import math

import torch
from torch import Tensor

from export.custom_model import DataSpec, Input, Model, Noise, Program, Score, TensorSpec, module

SCALE, WINDING = torch.tensor([2.0, 0.2]), 1.5
POINT, LATENT = TensorSpec("point", shape=(2,)), TensorSpec("latent", shape=(2,), doc="standard normal")
LOG_DENSITY = TensorSpec("log_density", doc="in nats")
EXACT = Score("exact", dimensions=2, coordinate_space="the plane", nats_output="log_density")


def wind(rows: Tensor, winding: float) -> Tensor:
    """Rotate each point [B, 2] by an angle proportional to its radius; this preserves areas."""
    angle = winding * rows.square().sum(1).sqrt()
    x, y = rows.unbind(1)
    return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], 1)


decode = module(lambda latent: wind(latent * SCALE, WINDING))
encode = module(lambda point: wind(point, -WINDING) / SCALE)


@module
def score(point: Tensor) -> Tensor:
    latent: Tensor = encode(point)
    return -0.5 * latent.square().sum(1) - math.log(2 * math.pi) - SCALE.log().sum()


PROGRAMS = (
    Program("sample", decode, (POINT,), "Draw points.", noise=(Noise("latent", "normal", (2,), stream=0),)),
    Program("decode", decode, (POINT,), "Map latents to points.", inputs=(Input(LATENT),)),
    Program("encode", encode, (LATENT,), "Map points to latents.", inputs=(Input(POINT),)),
    Program("score", score, (LOG_DENSITY,), "Score points.", inputs=(Input(POINT),), score=EXACT),
)
MODEL = Model(DataSpec("vector", POINT), PROGRAMS)

"""DDIM sampler of a U-Net of 35 million parameters with random weights: images of 32 x 32 pixels.

The sampler is that of Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (2021), with a cosine
schedule (Nichol & Dhariwal 2021) and the preconditioning of Karras et al. (2022), so that images of a random
network are neither black nor white. Two environment variables change the model when it is exported:
UNET_WIDTH is the number of channels at the finest resolution, and UNET_ETA=1 adds the parameter `eta`, which
needs noise in each step.
"""

import math
import os

import torch
from torch import Tensor, nn

from benchmarks.gpu.timing.networks import CHANNELS, NUM_CLASSES, SIDE, WIDTH, UNet
from export.custom_model import DataSpec, Example, Model, Noise, Parameter, Program, Steps, TensorSpec, module

SHAPE = (CHANNELS, SIDE, SIDE)
# The schedule ends before cos(pi / 2) = 0, where the image has no signal to divide by.
LAST_TIME = 0.99
# Standard deviation of the pixels, in -1..1, that the preconditioning expects.
DATA_STD = 0.5
IMAGE = TensorSpec("image", "uint8", (SIDE, SIDE, CHANNELS), minimum=0, maximum=255)
PLANES = TensorSpec("planes", shape=SHAPE, doc="noisy image in -1..1")
STEPS = Parameter("steps", "integer", 20, 1, 1000, doc="evaluations of the network")
LABEL = Parameter("label", "integer", 0, 0, NUM_CLASSES - 1, doc="class of the image")
ETA = Parameter("eta", "float", 0.0, 0.0, 1.0, doc="0 is deterministic, 1 adds the noise of DDPM")
START_NOISE = Noise("start_noise", "normal", SHAPE, stream=0)
STEP_NOISE = Noise("step_noise", "normal", SHAPE, stream=1)
HAS_ETA = os.environ.get("UNET_ETA", "0") == "1"


@module
def start(start_noise: Tensor) -> Tensor:
    return start_noise.clone()


class Step(nn.Module):
    """One step of DDIM: to less noise along the direction of the estimated noise."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, planes: Tensor, label: Tensor, step_index: Tensor, num_steps: Tensor) -> Tensor:
        moved, direction, noise_std, _ = self.move(planes, label, step_index, num_steps)
        return moved + noise_std * direction

    def move(
        self, planes: Tensor, label: Tensor, step_index: Tensor, num_steps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the mean without noise, the direction, and the standard deviations of noise and of eta 1."""
        time = 1 - step_index / num_steps
        signal, noise = _schedule(time)
        next_signal, next_noise = _schedule(1 - (step_index + 1) / num_steps)
        std = torch.sqrt((DATA_STD * signal) ** 2 + noise**2)
        correction = noise * DATA_STD / std * self.network(planes / std, time, label)
        clean = (signal * (DATA_STD / std) ** 2 * planes + correction).clamp(-1, 1)
        direction = (planes - signal * clean) / noise
        eta_std = next_noise / noise * torch.sqrt((1 - (signal / next_signal) ** 2).clamp(min=0))
        return next_signal * clean, direction, next_noise, eta_std


class StochasticStep(Step):
    """One step of DDIM in which new noise replaces a part of the estimated noise."""

    def forward(  # type: ignore[override]
        self,
        planes: Tensor,
        label: Tensor,
        eta: Tensor,
        step_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> Tensor:
        moved, direction, noise_std, eta_std = self.move(planes, label, step_index, num_steps)
        added_std = eta.reshape(-1, 1, 1, 1) * eta_std
        kept_std = torch.sqrt((noise_std**2 - added_std**2).clamp(min=0))
        return moved + kept_std * direction + added_std * step_noise


@module
def to_image(planes: Tensor) -> Tensor:
    return ((planes + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _schedule(time: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviations of signal and noise, [B, 1, 1, 1], at times [B] in 0..1."""
    angle = (math.pi / 2 * LAST_TIME) * time.reshape(-1, 1, 1, 1)
    return angle.cos(), angle.sin()


def build_program(width: int, has_eta: bool) -> Program:
    """Return the program `sample` of a network with random weights, which are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(width).requires_grad_(False)
    return Program(
        "sample",
        to_image,
        (IMAGE,),
        "Draw images of noise: the weights are random.",
        init=start,
        step=StochasticStep(network) if has_eta else Step(network),
        state=(PLANES,),
        steps=Steps(parameter="steps"),
        parameters=(STEPS, LABEL, *((ETA,) if has_eta else ())),
        noise=(START_NOISE, *((STEP_NOISE,) if has_eta else ())),
        previewable=True,
    )


# One short request: on a CPU, an evaluation of a row takes a tenth of a second.
EXAMPLE = Example("sample", seed=1, parameters={"steps": 2, "label": 3, **({"eta": 0.5} if HAS_ETA else {})})
SAMPLE = build_program(int(os.environ.get("UNET_WIDTH", WIDTH)), HAS_ETA)
MODEL = Model(DataSpec("image", IMAGE, num_levels=256), (SAMPLE,), examples=(EXAMPLE,))

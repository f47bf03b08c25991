"""Graphs of the sampling programs: initial states, steps and the readout.

`memory` in the state is what the sampler carries from one step to the next. Without a label, a row that
starts from pure noise draws its class by class frequency: that matches the data better than the label
"unknown", which is learned last. For a given row, which shows its class itself, the label "unknown" is
used.
"""

import torch
from torch import Tensor, nn

from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.solvers import (
    SIGMA_MAX,
    broadcast_to_rows,
    build_update,
    denoising_interval,
    noise_level,
    resampling_update,
)


class SampleInit(nn.Module):
    """Initial state: noise of standard deviation SIGMA_MAX, and a class drawn where none is given."""

    cumulative_frequencies: Tensor

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.num_classes = len(denoiser.class_frequencies)
        self.register_buffer("cumulative_frequencies", denoiser.class_frequencies.cumsum(0)[:-1])

    def forward(self, initial_noise: Tensor, label: Tensor, label_noise: Tensor) -> tuple[Tensor, ...]:
        drawn = (label_noise.unsqueeze(1) >= self.cumulative_frequencies).long().sum(1)
        row_label = torch.where(label < self.num_classes, label, drawn)
        zeros = torch.zeros_like(initial_noise)
        return SIGMA_MAX * initial_noise, zeros, zeros.clone(), row_label, torch.ones_like(label_noise)


class _EditInit(nn.Module):
    """Initial state: a given row with noise of the level that `strength` selects."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.scale = denoiser.scale

    def initial_state(
        self, row: Tensor, strength: Tensor, noise: Tensor, label: Tensor
    ) -> tuple[Tensor, ...]:
        clean = self.scale(row)
        x = clean + broadcast_to_rows(noise_level(strength), clean) * noise
        return x, torch.zeros_like(x), clean.clone(), label.clone(), strength.clone()


class EditImageInit(_EditInit):
    """Image -> initial state."""

    def forward(
        self, image: Tensor, strength: Tensor, initial_noise: Tensor, label: Tensor
    ) -> tuple[Tensor, ...]:
        return self.initial_state(image, strength, initial_noise, label)


class EditPointInit(_EditInit):
    """Point -> initial state."""

    def forward(
        self, point: Tensor, strength: Tensor, initial_noise: Tensor, label: Tensor
    ) -> tuple[Tensor, ...]:
        return self.initial_state(point, strength, initial_noise, label)


class _InpaintInit(nn.Module):
    """Initial state: pure noise, and the known elements of a given row."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.scale = denoiser.scale

    def initial_state(self, row: Tensor, known: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        clean = self.scale(row) * known.to(noise.dtype)
        return SIGMA_MAX * noise, clean, clean.clone()


class InpaintImageInit(_InpaintInit):
    """Image -> initial state."""

    def forward(self, image: Tensor, known: Tensor, initial_noise: Tensor) -> tuple[Tensor, ...]:
        return self.initial_state(image, known, initial_noise)


class InpaintPointInit(_InpaintInit):
    """Point -> initial state."""

    def forward(self, point: Tensor, known: Tensor, initial_noise: Tensor) -> tuple[Tensor, ...]:
        return self.initial_state(point, known, initial_noise)


class _DenoiserModule(nn.Module):
    """Base of the steps, which evaluate the trained denoiser."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser


class SampleStep(_DenoiserModule):
    """One network evaluation and the linear update of the row's sampler."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        row_label: Tensor,
        start_position: Tensor,
        step_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
        eta: Tensor,
    ) -> tuple[Tensor, ...]:
        interval = denoising_interval(step_index, num_steps, sampler, start_position)
        update = build_update(interval, sampler, eta)
        denoised = self.denoiser(x, update.sigma, row_label)
        return *update.apply(x, memory, denoised, step_noise), denoised, row_label, start_position


class GuidedStep(_DenoiserModule):
    """The same with classifier-free guidance, D + (guidance - 1) (D - D without the label).

    Guidance 1 gives D.
    """

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        row_label: Tensor,
        start_position: Tensor,
        step_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
        eta: Tensor,
        guidance: Tensor,
    ) -> tuple[Tensor, ...]:
        interval = denoising_interval(step_index, num_steps, sampler, start_position)
        update = build_update(interval, sampler, eta)
        labels = torch.stack([row_label, torch.full_like(row_label, self.denoiser.num_classes)], 1)
        repeated = (torch.stack([part, part], 1).flatten(0, 1) for part in (x, update.sigma))
        both: Tensor = self.denoiser(*repeated, labels.flatten())
        with_label, without_label = both.reshape(-1, 2, *x.shape[1:]).unbind(1)
        denoised = with_label + broadcast_to_rows(guidance - 1, x) * (with_label - without_label)
        return *update.apply(x, memory, denoised, step_noise), denoised, row_label, start_position


class InpaintStep(_DenoiserModule):
    """A denoising step that replaces the known elements by their values plus noise of the new level."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        clean: Tensor,
        known: Tensor,
        label: Tensor,
        rounds: Tensor,
        step_noise: Tensor,
        known_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        update = resampling_update(step_index, num_steps, rounds)
        denoised, is_known = self.denoiser(x, update.sigma, label), known == 1
        next_x, _ = update.apply(x, torch.zeros_like(x), denoised, step_noise)
        noisy = clean + broadcast_to_rows(update.next_sigma, clean) * known_noise
        return (
            torch.where(is_known, noisy, next_x),
            torch.where(is_known, clean, denoised),
            clean.clone(),
        )


class SampleReadout(nn.Module):
    """Denoised estimate -> row: the sample after the last step, a preview before it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.unscale = denoiser.unscale

    def forward(self, denoised: Tensor) -> Tensor:
        return self.unscale(denoised)

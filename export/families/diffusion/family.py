"""The diffusion model as the exporter sees it: presets, golden requests, figures and pictures."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from export import replay
from export.data import Dataset
from export.families.base import Preset
from export.families.diffusion import bound, flow, latents, samples
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampler import DDIM, HEUN
from export.figure import Drawing, Panel, Scatter
from export.golden import Example
from export.measure import SETS, Judge, play, sampler, two_sample_test
from export.program import Program
from export.replay import Player
from export.training import Network, Settings
from samovar.v1 import manifest_pb2

# The picture of points: -LIMIT..LIMIT on both axes.
LIMIT = 2.5


class Family:
    """The diffusion model as the exporter sees it."""

    name = "diffusion"
    description = (
        "Class-conditional diffusion model (EDM, Karras et al. 2022) with DDIM, Heun and DPM-Solver++(2M)."
    )
    operations: tuple[str, ...] = (
        "sample",
        "sample:guided",
        "sample:edit",
        "sample:inpaint",
        "encode",
        "decode",
        "reconstruct",
        "score",
        "score:ode",
    )
    refusals: Mapping[str, str] = {
        "energy": "score estimates the log-density itself, normalised",
        "classify": "it learns rows given their class; what that says of a row's class is not measured",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=8, depth=1, training=Settings(steps=1), judge=Settings(steps=1), measured_rows=20
        ),
        "starter": Preset(
            width=32,
            depth=1,
            training=Settings(steps=1000, batch_rows=128),
            kinds={
                "vector": Preset(
                    width=192,
                    depth=3,
                    training=Settings(steps=8000, batch_rows=256, weight_decay=0, ema_decay=0.999),
                    measured_rows=10_000,
                )
            },
        ),
        "full": Preset(
            width=96,
            depth=2,
            dropout=0.1,
            training=Settings(steps=20_000, batch_rows=256, learning_rate=5e-4),
            kinds={
                "vector": Preset(
                    width=256,
                    depth=4,
                    training=Settings(steps=40_000, batch_rows=512, weight_decay=0, ema_decay=0.999),
                    measured_rows=10_000,
                )
            },
        ),
    }

    def network(self, data: Dataset, preset: Preset) -> Denoiser:
        """An untrained denoiser, preconditioned by the spread of the training rows."""
        return Denoiser(data, preset)

    def programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Samples in four ways, latents, and two scores."""
        assert isinstance(network, Denoiser)
        made = samples.programs(network, data.value)
        readout = made[0].readout
        assert isinstance(readout, samples.Readout)
        return (
            *made,
            *latents.programs(network, data.value, readout),
            bound.program(network, data.value),
            flow.program(network, data.value),
        )

    def examples(self, data: Dataset) -> tuple[Example, ...]:
        """A few short requests to each program, and the default one to sample."""
        tensor, rows = data.value.tensor, data.test.rows[:2]
        labels: dict[str, NDArray[np.generic]] = {"label": np.arange(2)}
        given: dict[str, NDArray[np.generic]] = {tensor.name: rows}
        known, few = first_half(rows), {"steps": 4}
        latent = np.linspace(-2, 2, rows.size, dtype=np.float32).reshape(2, -1)
        return (
            Example("sample", seed=1, rows=2),
            Example("sample", 2, 5, 2, {"sampler": HEUN, "steps": 9}, labels),
            Example("sample", 3, 0, 2, {"sampler": DDIM, "steps": 5, "eta": 1}, labels),
            Example("sample:guided", 4, 0, 2, few, labels),
            Example("sample:edit", 5, 0, 2, {**few, "strength": 0.4}, {**given, **labels}),
            Example("sample:inpaint", 6, 0, 2, few, {**given, "known": known}),
            Example("encode", 0, 0, 2, few, given),
            Example("decode", 0, 0, 2, few, {"latent": latent, **labels}),
            Example("reconstruct", 0, 0, 2, {"steps": 7}, {**given, **labels}),
            Example("score", 7, 0, 2, {"draws": 4}, given),
            Example("score:ode", 8, 0, 2, {"steps": 13}, {**given, **labels}),
        )

    def quality(self, player: Player, data: Dataset, preset: Preset) -> list[manifest_pb2.Quality]:
        """How samples compare with test rows, and whether they show the label that they were asked for."""
        draw, count = sampler(player), preset.measured_rows
        if data.value.kind == "vector":
            return [two_sample_test(data, draw, count)]
        judge = Judge.train(data, preset.judge)
        labels = np.arange(count) % len(data.value.class_labels)
        rows = _labelled(player, labels)
        labelled = play(player, "sample", rows, "labelled samples")["image"]
        return [*judge.similarity(draw, count), judge.agreement(labelled, labels)]

    def panels(self, player: Player, data: Dataset) -> Sequence[Drawing]:
        """Test rows beside samples, of images a line for each class."""
        if data.value.kind == "vector":
            rows = replay.request(player.program("sample"), SETS, range(len(data.test)))
            return [
                Scatter("test points", data.test.rows, LIMIT),
                Scatter("samples", player.play("sample", rows)["point"], LIMIT),
            ]
        classes = min(10, len(data.value.class_labels))
        labels = np.repeat(np.arange(classes), 10)
        order = np.concatenate([np.flatnonzero(data.test.labels == label)[:10] for label in range(classes)])
        made = player.play("sample", _labelled(player, labels))["image"]
        return [
            Panel("test images", data.test.rows[order]),
            Panel(f"samples, {samples.DEFAULT_STEPS} steps", made),
        ]


def first_half(rows: NDArray[np.generic]) -> NDArray[np.uint8]:
    """A mask, uint8 like rows [N, length, ...], that is 1 in the first half: of images, the upper one."""
    known = np.zeros(rows.shape, np.uint8)
    known[:, : rows.shape[1] // 2] = 1
    return known


def _labelled(player: Player, labels: NDArray[np.int64]) -> replay.Rows:
    return replay.request(player.program("sample"), SETS, range(len(labels)), inputs={"label": labels})


FAMILY = Family()

"""The client's recipes against real models, run as a reader runs them, and samovar.latent beneath them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import samovar
from export.datasets import loading
from samovar import latent
from tests.support.live_server import HANG_SECONDS, RunningServer
from tests.support.run_example import EXAMPLES, run_example, run_example_on

NAMES = ("interpolate", "inpaint", "augment", "restyle")
# An image of 8 x 8, enlarged, and the gap after it.
TILE = 66


@pytest.fixture
def server(default_server: RunningServer) -> RunningServer:
    """The real server, instead of the fake one of the other client tests."""
    return default_server


@pytest.fixture
def client(server: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(server.address, timeout=HANG_SECONDS) as connected:
        yield connected


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images and their classes, in a file of one's own."""
    path, test = tmp_path_factory.mktemp("digits") / "digits.npz", loading.load("digits").test
    np.savez(path, image=test.rows, label=test.labels)
    return path


def tiles(path: Path) -> tuple[int, int]:
    """Columns and lines of a picture."""
    with Image.open(path) as picture:
        width, height = picture.size
    return (width + 2) // TILE, (height + 2) // TILE


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short_and_its_help_is_its_beginning(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) < 100
    ended = run_example(name, "--help")
    assert ended.returncode == 0
    assert source.partition('"""')[2].partition('"""')[0].strip() in ended.stdout


def test_walks_are_between_images_where_a_model_encodes(server: RunningServer, tmp_path: Path) -> None:
    picture = tmp_path / "walks.png"
    words = ("digits-gan", "digits-vae", "--walks", 2, "--steps", 5, "-o", picture)
    said = run_example_on(server, "interpolate", *words)
    assert "lines 1 to 2: digits-gan, between draws" in said
    assert "lines 3 to 4: digits-vae, between samples of digits-" in said
    assert tiles(picture) == (5, 4)


def test_the_same_seed_walks_the_same_way(server: RunningServer, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, seed in zip(pictures, (1, 1, 2), strict=True):
        run_example_on(server, "interpolate", "digits-vae", "--seed", seed, "--walks", 1, "-o", picture)
    first, again, other = (picture.read_bytes() for picture in pictures)
    assert first == again != other


def test_every_way_to_inpaint_is_shown_and_says_what_it_is(
    server: RunningServer, digits: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "filled.png"
    words = ("digits-vae", "digits-pixelcnn", "--images", digits, "--hide", "right", "--count", 3)
    said = run_example_on(server, "inpaint", *words, "-o", picture)
    assert "line 3: digits-pixelcnn, sample: error " in said
    assert "Exact when the known pixels come first in raster order" in said
    assert "line 4: digits-vae, sample:inpaint: error " in said
    assert "by a Markov chain. The result is approximate." in said
    assert tiles(picture)[0] == 3
    shown = np.asarray(Image.open(picture))[::8, ::8][:, : 3 * 8]
    assert tiles(picture)[1] >= 4
    assert (shown[9:16, 5:8] == 0).all()


def test_generated_images_are_judged_by_what_they_teach(
    server: RunningServer, digits: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "made.png"
    words = ("--images", digits, "--real", 200, "--test", 200, "--generated", 50, "-o", picture)
    said = run_example_on(server, "augment", "digits-gan", *words)
    lines = {line[:16].strip(): line for line in said.splitlines()}
    real, generated = (
        float(lines[name].partition("accuracy ")[2].split(" ")[0]) for name in ("real only", "generated only")
    )
    assert real > 0.85
    # An untrained GAN's images teach nothing.
    assert generated < 0.4
    assert "250 images" in lines["both"]
    assert "digits-mlp sees the class that was asked for: accuracy 0." in said
    assert tiles(picture) == (5, 10)


def test_images_without_classes_cannot_be_judged(server: RunningServer, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", loading.load("digits").test.rows)
    ended = run_example("augment", "--address", server.address, "--images", tmp_path / "rows.npy")
    assert ended.returncode == 1
    assert ended.stderr.endswith("rows.npy: expected .npz with image and label, for classes are needed\n")


def test_images_of_another_shape_are_refused(server: RunningServer, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((3, 28, 28), np.uint8))
    ended = run_example("inpaint", "--address", server.address, "--images", tmp_path / "rows.npy")
    assert ended.stderr.endswith("rows.npy: expected images [N, 8, 8], got [3, 28, 28]\n")


def test_a_folder_of_pictures_is_read(server: RunningServer, tmp_path: Path) -> None:
    for number, image in enumerate(loading.load("digits").test.rows[:4]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    words = ("digits-pixelcnn", "--images", tmp_path, "--count", 4, "-o", tmp_path / "filled.png")
    assert f"line 1: {tmp_path}" in run_example_on(server, "inpaint", *words)
    assert tiles(tmp_path / "filled.png") == (4, 3)


def test_a_class_is_turned_into_another_step_by_step(
    server: RunningServer, digits: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "restyled.png"
    words = ("--from", 3, "--to", 8, "--count", 4, "--amounts", 0.5, 1, "--images", digits)
    said = run_example_on(server, "restyle", "digits-vae", *words, "-o", picture)
    assert [line.partition(":")[0] for line in said.splitlines()[:3]] == [
        f"digits-vae, changed by {amount}" for amount in ("0", "0.5", "1")
    ]
    assert "by digits-mlp" in said
    assert tiles(picture) == (4, 3)


def test_too_few_images_are_refused(server: RunningServer, tmp_path: Path) -> None:
    test = loading.load("digits").test
    np.savez(tmp_path / "few.npz", image=test.rows[:5], label=test.labels[:5])
    ended = run_example("augment", "--address", server.address, "--images", tmp_path / "few.npz")
    assert ended.returncode == 1
    assert "few.npz: expected 600 images at least, got 5; " in ended.stderr


def test_images_are_edited_as_far_as_asked(server: RunningServer, digits: Path, tmp_path: Path) -> None:
    """By the diffusion model: hardly at all, they are the images themselves, and teach what those teach."""
    words = ("--method", "edit", "--strength", 0.01, "--images", digits, "--real", 60, "--test", 100)
    made = tmp_path / "made.png"
    said = run_example_on(server, "augment", "digits-diffusion", *words, "--generated", 60, "-o", made)
    lines = {line[:16].strip(): line.partition("accuracy ")[2] for line in said.splitlines()}
    assert lines["generated only"] == lines["real only"]
    restyled = tmp_path / "restyled.png"
    turn = ("--from", 3, "--to", 8, "--count", 2, "--amounts", 0.01, 1, "--images", digits)
    said = run_example_on(server, "restyle", "digits-diffusion", *turn, "-o", restyled)
    assert said.startswith("digits-diffusion, changed by 0:")
    assert tiles(restyled) == (2, 3)


def test_a_class_that_there_is_not_is_one_line(server: RunningServer) -> None:
    ended = run_example("restyle", "--address", server.address, "--from", "3", "--to", "ten")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9; got 'ten'" in ended.stderr


def test_no_server_is_one_line() -> None:
    ended = run_example("inpaint", "--address", "127.0.0.1:1")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["digits-vae", "digits-realnvp"])
def test_a_draw_is_where_a_sample_of_that_seed_begins(client: samovar.Client, name: str) -> None:
    settings = {"pixels": "mean"} if name == "digits-vae" else {}
    sampled = client.sample(name, 4, seed=9, parameters=settings).value
    drawn = latent.decode(client, name, latent.draw(client, name, 4, seed=9))
    np.testing.assert_array_equal(drawn, sampled)


def test_a_walk_between_images_is_straight_where_the_encoder_gives_distributions(
    client: samovar.Client,
) -> None:
    a, b = loading.load("digits").test.rows[:2]
    walk = latent.interpolate(client, "digits-vae", a, b, 5)
    means = client.encode("digits-vae", np.stack([a, b])).outputs["mean"]
    expected = client.decode("digits-vae", np.linspace(means[0], means[1], 5, dtype=np.float32)).value
    np.testing.assert_array_equal(walk, expected)
    assert (walk[0] == client.reconstruct("digits-vae", a).value[0]).all()


def test_a_walk_between_images_follows_a_circle_where_they_have_one_latent_each(
    client: samovar.Client,
) -> None:
    """Of a flow: and its ends are the images themselves."""
    a, b = loading.load("digits").test.rows[:2]
    walk = latent.interpolate(client, "digits-realnvp", a, b, 3)
    codes = latent.encode(client, "digits-realnvp", np.stack([a, b]))
    middle = latent.decode(client, "digits-realnvp", latent.slerp(codes[0], codes[1], [0.5]))
    np.testing.assert_array_equal(walk[[0, 2]], np.stack([a, b]))
    np.testing.assert_array_equal(walk[1], middle[0])


def test_an_edit_moves_codes_by_the_difference_of_the_means_of_two_groups(client: samovar.Client) -> None:
    test = loading.load("digits").test
    eights, threes = (test.rows[test.labels == label][:20] for label in (8, 3))
    codes = {name: latent.encode(client, "digits-vae", rows) for name, rows in (("8", eights), ("3", threes))}
    direction = latent.attribute(client, "digits-vae", eights, threes)
    np.testing.assert_allclose(direction, codes["8"].mean(0) - codes["3"].mean(0), atol=1e-5)
    still = latent.edit(client, "digits-vae", threes, direction, 0)
    np.testing.assert_array_equal(still, client.reconstruct("digits-vae", threes).value)
    moved = latent.edit(client, "digits-vae", threes, direction, 1)
    np.testing.assert_array_equal(moved, latent.decode(client, "digits-vae", codes["3"] + direction))

"""The client's recipes as subprocesses against a real server, and samovar.latent with real models."""

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

RECIPES = ("interpolate", "inpaint", "augment", "restyle")
# Pixels of an enlarged 8 x 8 image and the gap after it.
TILE_PIXELS = 66


@pytest.fixture
def server(default_server: RunningServer) -> RunningServer:
    """A real server; the other client tests use a fake one."""
    return default_server


@pytest.fixture
def client(server: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(server.address, timeout=HANG_SECONDS) as connected:
        yield connected


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a .npz file with real images and their classes."""
    path, test = tmp_path_factory.mktemp("digits") / "digits.npz", loading.load("digits").test
    np.savez(path, image=test.rows, label=test.labels)
    return path


def grid_size(path: Path) -> tuple[int, int]:
    """Return the numbers of columns and rows of a grid of images."""
    with Image.open(path) as grid:
        width, height = grid.size
    return (width + 2) // TILE_PIXELS, (height + 2) // TILE_PIXELS


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_short_and_prints_its_docstring_as_help(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) < 100
    process = run_example(name, "--help")
    assert process.returncode == 0
    assert source.partition('"""')[2].partition('"""')[0].strip() in process.stdout


def test_interpolate_uses_images_for_encoders_and_latents_for_others(
    server: RunningServer, tmp_path: Path
) -> None:
    path = tmp_path / "walks.png"
    arguments = ("digits-gan", "digits-vae", "--walks", 2, "--steps", 5, "-o", path)
    output = run_example_on(server, "interpolate", *arguments)
    assert "grid rows 1 to 2: digits-gan, between random latents" in output
    assert "grid rows 3 to 4: digits-vae, between samples of digits-" in output
    assert grid_size(path) == (5, 4)


def test_interpolate_with_equal_seeds_writes_equal_files(server: RunningServer, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        run_example_on(server, "interpolate", "digits-vae", "--seed", seed, "--walks", 1, "-o", path)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other


def test_inpaint_shows_and_describes_each_operation(
    server: RunningServer, digits: Path, tmp_path: Path
) -> None:
    path = tmp_path / "inpainted.png"
    arguments = ("digits-vae", "digits-pixelcnn", "--images", digits, "--hide", "right", "--count", 3)
    output = run_example_on(server, "inpaint", *arguments, "-o", path)
    assert "grid row 3: digits-pixelcnn, sample: error " in output
    assert "Exact when the known pixels come first in raster order" in output
    assert "grid row 4: digits-vae, sample:inpaint: error " in output
    assert "by a Markov chain. The result is approximate." in output
    assert grid_size(path)[0] == 3
    pixels = np.asarray(Image.open(path))[::8, ::8][:, : 3 * 8]
    assert grid_size(path)[1] >= 4
    assert (pixels[9:16, 5:8] == 0).all()


def test_augment_compares_accuracy_on_real_and_generated_images(
    server: RunningServer, digits: Path, tmp_path: Path
) -> None:
    path = tmp_path / "generated.png"
    arguments = ("--images", digits, "--real", 200, "--test", 200, "--generated", 50, "-o", path)
    output = run_example_on(server, "augment", "digits-gan", *arguments)
    lines = {line[:16].strip(): line for line in output.splitlines()}
    real, generated = (
        float(lines[name].partition("accuracy ")[2].split(" ")[0]) for name in ("real only", "generated only")
    )
    assert real > 0.85
    # The GAN is untrained, so its images carry no information about the classes.
    assert generated < 0.4
    assert "250 images" in lines["both"]
    assert "digits-mlp predicts the requested class: accuracy 0." in output
    assert grid_size(path) == (5, 10)


def test_augment_rejects_images_without_labels(server: RunningServer, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", loading.load("digits").test.rows)
    process = run_example("augment", "--address", server.address, "--images", tmp_path / "rows.npy")
    assert process.returncode == 1
    message = "rows.npy: missing labels; expected a .npz file with the arrays image and label\n"
    assert process.stderr.endswith(message)


def test_inpaint_rejects_images_of_another_shape(server: RunningServer, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((3, 28, 28), np.uint8))
    process = run_example("inpaint", "--address", server.address, "--images", tmp_path / "rows.npy")
    assert process.stderr.endswith("rows.npy: expected images [N, 8, 8], got [3, 28, 28]\n")


def test_inpaint_reads_directory_of_png_files(server: RunningServer, tmp_path: Path) -> None:
    for index, image in enumerate(loading.load("digits").test.rows[:4]):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    path = tmp_path / "inpainted.png"
    arguments = ("digits-pixelcnn", "--images", tmp_path, "--count", 4, "-o", path)
    assert f"grid row 1: {tmp_path}" in run_example_on(server, "inpaint", *arguments)
    assert grid_size(path) == (4, 3)


def test_restyle_shows_and_classifies_each_amount(
    server: RunningServer, digits: Path, tmp_path: Path
) -> None:
    path = tmp_path / "restyled.png"
    arguments = ("--from", 3, "--to", 8, "--count", 4, "--amounts", 0.5, 1, "--images", digits)
    output = run_example_on(server, "restyle", "digits-vae", *arguments, "-o", path)
    assert [line.partition(":")[0] for line in output.splitlines()[:3]] == [
        f"digits-vae, changed by {amount}" for amount in ("0", "0.5", "1")
    ]
    assert "by digits-mlp" in output
    assert grid_size(path) == (4, 3)


def test_augment_rejects_file_with_too_few_images(server: RunningServer, tmp_path: Path) -> None:
    test = loading.load("digits").test
    np.savez(tmp_path / "few.npz", image=test.rows[:5], label=test.labels[:5])
    process = run_example("augment", "--address", server.address, "--images", tmp_path / "few.npz")
    assert process.returncode == 1
    assert "few.npz: expected at least 600 images, got 5; " in process.stderr


def test_recipes_edit_images_by_strength(server: RunningServer, digits: Path, tmp_path: Path) -> None:
    """An edit of strength 0.01 returns the image itself, so that training on edits gives equal accuracy."""
    generated, restyled = tmp_path / "generated.png", tmp_path / "restyled.png"
    arguments = ("--variant", "edit", "--strength", 0.01, "--images", digits, "--real", 60, "--test", 100)
    output = run_example_on(
        server, "augment", "digits-diffusion", *arguments, "--generated", 60, "-o", generated
    )
    lines = {line[:16].strip(): line.partition("accuracy ")[2] for line in output.splitlines()}
    assert lines["generated only"] == lines["real only"]
    output = run_example_on(
        server,
        "restyle",
        "digits-diffusion",
        *("--from", 3, "--to", 8, "--count", 2, "--amounts", 0.01, 1, "--images", digits, "-o", restyled),
    )
    assert output.startswith("digits-diffusion, changed by 0:")
    assert grid_size(restyled) == (2, 3)


def test_restyle_rejects_unknown_class_in_one_line(server: RunningServer) -> None:
    process = run_example("restyle", "--address", server.address, "--from", "3", "--to", "ten")
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1
    assert "unknown class 'ten' of digits-" in process.stderr
    assert "expected one of: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in process.stderr


def test_inpaint_without_server_fails_with_one_line() -> None:
    process = run_example("inpaint", "--address", "127.0.0.1:1")
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["digits-vae", "digits-realnvp"])
def test_latent_draw_decodes_to_sample_of_same_seed(client: samovar.Client, name: str) -> None:
    parameters = {"pixels": "mean"} if name == "digits-vae" else {}
    samples = client.sample(name, 4, seed=9, parameters=parameters).value
    decoded = latent.decode(client, name, latent.draw(client, name, 4, seed=9))
    np.testing.assert_array_equal(decoded, samples)


def test_latent_interpolate_uses_lerp_between_means(client: samovar.Client) -> None:
    a, b = loading.load("digits").test.rows[:2]
    images = latent.interpolate(client, "digits-vae", a, b, 5)
    means = client.encode("digits-vae", np.stack([a, b])).outputs["mean"]
    expected = client.decode("digits-vae", np.linspace(means[0], means[1], 5, dtype=np.float32)).value
    np.testing.assert_array_equal(images, expected)
    assert (images[0] == client.reconstruct("digits-vae", a).value[0]).all()


def test_latent_interpolate_uses_slerp_between_latents_of_a_flow(client: samovar.Client) -> None:
    """A flow is invertible, so that both ends are the images themselves."""
    a, b = loading.load("digits").test.rows[:2]
    images = latent.interpolate(client, "digits-realnvp", a, b, 3)
    latents = latent.encode(client, "digits-realnvp", np.stack([a, b]))
    middle = latent.decode(client, "digits-realnvp", latent.slerp(latents[0], latents[1], [0.5]))
    np.testing.assert_array_equal(images[[0, 2]], np.stack([a, b]))
    np.testing.assert_array_equal(images[1], middle[0])


def test_latent_edit_adds_difference_of_mean_latents(client: samovar.Client) -> None:
    test = loading.load("digits").test
    eights, threes = (test.rows[test.labels == label][:20] for label in (8, 3))
    latents_of_eights, latents_of_threes = (
        latent.encode(client, "digits-vae", rows) for rows in (eights, threes)
    )
    direction = latent.attribute(client, "digits-vae", eights, threes)
    np.testing.assert_allclose(direction, latents_of_eights.mean(0) - latents_of_threes.mean(0), atol=1e-5)
    unchanged = latent.edit(client, "digits-vae", threes, direction, 0)
    np.testing.assert_array_equal(unchanged, client.reconstruct("digits-vae", threes).value)
    edited = latent.edit(client, "digits-vae", threes, direction, 1)
    np.testing.assert_array_equal(edited, latent.decode(client, "digits-vae", latents_of_threes + direction))

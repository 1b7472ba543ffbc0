"""Corruptions against their formulas in numpy and other libraries, and their independence of the batch."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from probquant.corruptions import CORRUPTIONS, STRENGTHS, corrupt

SEVERITIES = range(1, 6)


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 17, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def brighter(pixel, added):
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + added))


FORMULAS = {
    "contrast": lambda x, factor: (x - x.mean((2, 3), keepdims=True)) * factor + x.mean((2, 3), keepdims=True),
    "dark": lambda x, factor: x * factor,
    "brightness": lambda x, added: np.apply_along_axis(brighter, 1, x, added),
    "blur": lambda x, sigma: ndimage.gaussian_filter(x, (0, 0, sigma, sigma), mode="nearest", truncate=4),
}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", FORMULAS)
def test_formulas(images, kind, severity):
    images[0, :, 0, 0] = 0
    x = images.numpy() / 255
    wanted = np.clip(FORMULAS[kind](x, STRENGTHS[kind][severity - 1]), 0, 1)
    np.testing.assert_allclose(corrupt(images.float() / 255, kind, severity).numpy(), wanted, rtol=0, atol=2e-6)
    assert (corrupt(images, kind, severity).int() - torch.from_numpy(255 * wanted)).abs().max() <= 0.501


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_wanted_strength(severity):
    grey = torch.full((1, 3, 128, 128), 0.5)
    grey[0, 0, 0, 0] = 0.25
    change = (corrupt(grey, "noise", severity) - grey).flatten()
    sigma = STRENGTHS["noise"][severity - 1]
    expected = np.clip(np.random.default_rng(0).normal(0, sigma, 10**6), -0.5, 0.5).std()
    assert abs(change.mean()) < 0.02 * sigma + 1e-3
    assert abs(change.std() / expected - 1) < 0.02


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_counts_photons(severity):
    photons = STRENGTHS["shot"][severity - 1]
    counts = corrupt(torch.full((1, 3, 128, 128), 0.2), "shot", severity) * photons
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    inside = np.minimum(np.random.default_rng(0).poisson(0.2 * photons, 10**6), photons)
    assert abs(float(counts.mean()) / inside.mean() - 1) < 0.02 and abs(float(counts.var()) / inside.var() - 1) < 0.05


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_pillows(images, severity):
    file = io.BytesIO()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=STRENGTHS["jpeg"][severity - 1])
    wanted = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(corrupt(images, "jpeg", severity)[0], wanted)


def test_pixelate_leaves_so_many_different_pixels():
    ramp = torch.arange(3 * 40 * 40, dtype=torch.float32).reshape(3, 40, 40) / 4800
    for severity, factor in enumerate(STRENGTHS["pixelate"], start=1):
        coarse = corrupt(ramp, "pixelate", severity)
        assert len(coarse.unique()) == 3 * int(40 * factor) ** 2
        assert abs(float(coarse.mean() - ramp.mean())) < 0.01


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_is_grey_and_takes_contrast(images, severity):
    """The clouds add the same to every channel; what is left of the differences follows from the thickness."""
    x, (thickness, _) = images.float() / 255, STRENGTHS["fog"][severity - 1]
    fogged, left = corrupt(x, "fog", severity), x.amax((1, 2, 3)) / (x.amax((1, 2, 3)) + thickness)
    assert torch.allclose(fogged - fogged[:, :1], (x - x[:, :1]) * left[:, None, None, None], atol=1e-5)
    clouds = (fogged - x * left[:, None, None, None])[:, 0] / (thickness * left)[:, None, None]
    assert torch.allclose(clouds.amin((1, 2)), torch.zeros(4), atol=1e-5) and torch.allclose(clouds.amax((1, 2)), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("kind", ["clean", *CORRUPTIONS])
@pytest.mark.parametrize("form", ["uint8", "float32", "channels_last"])
def test_an_image_does_not_depend_on_its_batch(images, kind, form):
    if form != "uint8":
        images = images.float() / 255
    if form == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    before = images.clone()
    together = corrupt(images, kind)
    assert torch.equal(images, before), "the input was changed"
    assert together.dtype == images.dtype and together.shape == images.shape
    assert kind == "clean" or not torch.equal(together, images)
    assert torch.equal(together, torch.cat([corrupt(image[None], kind) for image in images]))
    assert torch.equal(together.flip(0), corrupt(images.flip(0), kind))
    assert torch.equal(together[2], corrupt(images[2], kind))
    assert together.min() >= 0 and together.max() <= (255 if form == "uint8" else 1)


@pytest.mark.parametrize("kind", ["noise", "shot", "fog"])
def test_chance_depends_on_seed_and_image(images, kind):
    assert torch.equal(corrupt(images, kind), corrupt(images, kind))
    assert not torch.equal(corrupt(images, kind), corrupt(images, kind, seed=1))
    flat = torch.full((2, 3, 8, 8), 0.5)
    flat[1] += 1e-3
    first, second = corrupt(flat, kind) - flat
    assert not torch.allclose(first, second, atol=2e-3)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_uint8_and_float_images_become_the_same(images, kind):
    assert torch.equal(corrupt(images, kind), (corrupt(images.float() / 255, kind) * 255).round().to(torch.uint8))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_black_single_pixels_and_empty_batches_pass(kind):
    assert corrupt(torch.zeros(0, 3, 8, 8), kind).shape == (0, 3, 8, 8)
    assert bool(corrupt(torch.zeros(1, 3, 1, 1), kind).isfinite().all())
    assert len(STRENGTHS[kind]) == 5


def test_errors_name_the_value(images):
    with pytest.raises(ValueError, match="severity must be 1..5, got 6"):
        corrupt(images, "dark", 6)
    with pytest.raises(ValueError, match="'snow'.*contrast, dark, brightness"):
        corrupt(images, "snow")
    with pytest.raises(TypeError, match="float64"):
        corrupt(images.double(), "contrast")
    with pytest.raises(ValueError, match="jpeg wants images of 3 channels, got 1"):
        corrupt(images[:, :1], "jpeg")

"""Corruptions against their formulas in numpy, and their independence of the batch."""

import numpy as np
import pytest
import torch

from probquant.corruptions import CONTRAST, CORRUPTIONS, DARKNESS, NOISE, contrast, corrupt, dark, noise

SEVERITIES = range(1, 6)


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 17, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_and_dark_follow_their_formulas(images, severity):
    x = images.numpy() / 255
    mean = x.mean((2, 3), keepdims=True)
    expected = {
        contrast: np.clip((x - mean) * CONTRAST[severity - 1] + mean, 0, 1),
        dark: np.clip(x * DARKNESS[severity - 1], 0, 1),
    }
    for function, wanted in expected.items():
        in_float = function(images.float() / 255, severity)
        np.testing.assert_allclose(in_float.numpy(), wanted, rtol=0, atol=1e-6)
        assert (function(images, severity).int() - torch.from_numpy(255 * wanted)).abs().max() <= 0.5001


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_wanted_strength(severity):
    grey = torch.full((1, 3, 128, 128), 0.5)
    grey[0, 0, 0, 0] = 0.25
    change = (noise(grey, severity) - grey).flatten()
    inside = (change.abs() < 0.49).all()  # nothing was clipped, so the standard deviation is NOISE's
    sigma = NOISE[severity - 1]
    assert abs(change.mean()) < 0.02 * sigma + 1e-3
    if inside:
        assert abs(change.std() / sigma - 1) < 0.02
    else:
        expected = np.clip(np.random.default_rng(0).normal(0, sigma, 10**6), -0.5, 0.5).std()
        assert abs(change.std() / expected - 1) < 0.02


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
    assert torch.equal(together, torch.cat([corrupt(image[None], kind) for image in images]))
    assert torch.equal(together.flip(0), corrupt(images.flip(0), kind))
    assert torch.equal(together[2], corrupt(images[2], kind))
    assert together.min() >= 0 and together.max() <= (255 if form == "uint8" else 1)


def test_noise_depends_on_seed_and_image(images):
    assert torch.equal(noise(images), noise(images))
    assert not torch.equal(noise(images), noise(images, seed=1))
    flat = torch.full((2, 3, 8, 8), 0.5)
    flat[1] += 1e-3
    first, second = noise(flat) - flat
    assert not torch.allclose(first, second)


def test_uint8_and_float_images_get_the_same_noise(images):
    assert torch.equal(noise(images), (noise(images.float() / 255) * 255).round().to(torch.uint8))


def test_empty_batches_pass():
    for kind in CORRUPTIONS:
        assert corrupt(torch.zeros(0, 3, 8, 8), kind).shape == (0, 3, 8, 8)


def test_errors_name_the_value(images):
    with pytest.raises(ValueError, match="severity must be 1..5, got 6"):
        dark(images, 6)
    with pytest.raises(ValueError, match="'fog'.*contrast, dark, noise"):
        corrupt(images, "fog")
    with pytest.raises(TypeError, match="float64"):
        contrast(images.double())

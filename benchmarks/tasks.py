"""What accuracy.py measures on: a float network, pictures to calibrate and to evaluate it on, and how its outputs are judged.

Pictures are uint8 [N, 3, H, W] (RGB) until `normalize`, so that shifts can act on them. Pictures that calibrate are never
evaluated. A judgement is {metric: (value, float32's value)}; drops are float32's value minus the value, on the same pictures.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probquant.__main__ import named_model
from probquant.data import ImageSet, Preprocessing, bundled_photographs, image_folder, read_picture
from probquant.demo import choose_images

Judgement = dict[str, tuple[float, float]]


# ----------------------------------------------------------------------------------------------------------------------
# Classification


@dataclass
class Classification:
    """Labelled pictures, read from files or held in memory."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    calibration: ImageSet | Tensor
    evaluation: ImageSet | Tensor
    labels: Sequence[int]
    training: ImageSet | Tensor  # may be those that calibrate, never those that are evaluated

    def normalize(self, pictures: Tensor) -> Tensor:
        return self.preprocessing.normalize(pictures)

    def pictures(self, which: ImageSet | Tensor, batch: int, size: int | None = None) -> Iterator[Tensor]:
        """uint8 [n, 3, side, side]; size: another side than the network was trained with."""
        p = self.preprocessing
        if isinstance(which, ImageSet):
            scaled = p if size is None else Preprocessing(round(size * p.resize / p.crop), size, p.mean, p.std)
            yield from which.batches(scaled, batch)
            return
        for part in which.split(batch):
            yield part if size is None else F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)

    def keep(self, output: Tensor, first: int) -> list[int]:
        """What is kept of a batch's output: the class of each picture."""
        return output.argmax(1).tolist()

    def judge(self, kept: list[int], reference: list[int]) -> Judgement:
        n = len(kept)
        ours, theirs = ([a == b for a, b in zip(classes, self.labels, strict=True)] for classes in (kept, reference))
        low, high = paired_interval(sum(f and not q for q, f in zip(ours, theirs)), sum(q and not f for q, f in zip(ours, theirs)), n)
        top1, float_top1 = sum(ours) / n, sum(theirs) / n
        agreement = sum(a == b for a, b in zip(kept, reference)) / n
        return {"top1": (top1, float_top1), "agreement": (agreement, 1.0), "drop": (float_top1 - top1, 0.0), "drop_low": (low, 0.0), "drop_high": (high, 0.0)}


def paired_interval(lost: int, won: int, n: int) -> tuple[float, float]:
    """95 % interval of the drop of a share measured on the same n pictures, of which `lost` went wrong and `won` right.

    Agresti and Min (2005): Wald's interval for matched pairs with half a picture added to each of the four cells.
    """
    lost_, won_, n_ = lost + 0.5, won + 0.5, n + 2.0
    drop = (lost_ - won_) / n_
    half = 1.959964 * math.sqrt(lost_ + won_ - (lost_ - won_) ** 2 / n_) / n_
    return drop - half, drop + half


def split_pictures(folder: str | None, calibrate_on: str | None, limit: int | None) -> tuple[ImageSet, ImageSet]:
    """(those that calibrate, at most `limit` that are evaluated). `folder` may hold `calibration` and `validation`."""
    if folder is not None and (Path(folder) / "validation").is_dir():
        calibrate_on = calibrate_on or (str(Path(folder) / "calibration") if (Path(folder) / "calibration").is_dir() else None)
        folder = str(Path(folder) / "validation")
    return choose_images(folder, calibrate_on, limit)


def imagenet(name: str, folder: str | None, weights: str | None, calibrate_on: str | None, calibration: int | None, limit: int | None) -> Classification:
    """ImageNet-1k pictures. `folder` may hold `calibration` and `validation`; without the former packages' photographs calibrate."""
    model, preprocessing = named_model(name, weights)
    calibrating, evaluating = split_pictures(folder, calibrate_on, limit)
    known = [i for i, label in enumerate(evaluating.labels) if label >= 0]
    if not known:
        raise ValueError(f"no labelled pictures in {evaluating.source}")
    evaluating = ImageSet(*(tuple(values[i] for i in known) for values in (evaluating.paths, evaluating.labels)), evaluating.source)
    return Classification(name, model, preprocessing, calibrating.sample(calibration), evaluating, evaluating.labels, calibrating)


def cifar10(weights: str | None, file: str | None, calibration: int | None, train: int, limit: int | None) -> Classification:
    """ResNet-20 on a .npz of x uint8 [n, 32, 32, 3] and y [n]; a random part of it (128 unless told) calibrates, `train` others are
    there to train on (0: those that calibrate), the rest is evaluated."""
    import numpy as np

    from resnet20 import resnet20

    if not weights or not file:
        raise ValueError("resnet20 needs --weights FILE.th and --cifar FILE.npz")
    stored = np.load(file)
    x, y = torch.from_numpy(stored["x"]).permute(0, 3, 1, 2).contiguous(), stored["y"].tolist()
    order = random.Random(0).sample(range(len(x)), len(x))
    calibration = calibration or 128
    held_out, training, rest = order[:calibration], order[calibration : calibration + train], order[calibration + train :][:limit]
    if not rest:
        raise ValueError(f"--calibration {calibration} and --train {train} leave none of {len(x)} pictures to evaluate")
    return Classification("resnet20", resnet20(weights), Preprocessing(32, 32), x[held_out], x[rest], [y[i] for i in rest], x[training or held_out])


# ----------------------------------------------------------------------------------------------------------------------
# Detection


_GROUPS = 16  # of pictures, for the jackknife


@dataclass
class Detection:
    """A detector on COCO's val2017 layout. `network` is the module it is from (yolox.py, ssd.py): how pictures go in and boxes come out."""

    name: str
    model: nn.Module
    network: ModuleType
    calibration: ImageSet
    coco: object  # pycocotools' index of the annotations
    folder: Path
    ids: list[int]

    @property
    def training(self) -> ImageSet:
        return self.calibration

    def normalize(self, pictures: Tensor) -> Tensor:
        return self.network.network_input(pictures)

    @property
    def evaluation(self) -> list[int]:
        return self.ids

    def pictures(self, which: ImageSet | list[int], batch: int, size: int | None = None) -> Iterator[Tensor]:
        if size is not None:
            raise ValueError(f"the shift size:PIXELS is for classification: {self.name}'s boxes stand on {self.network.SIZE} x {self.network.SIZE} pixels")
        if isinstance(which, ImageSet):
            read = (camera_shaped(read_picture(path, view), number) for number, (path, view) in enumerate(zip(which.paths, which.views)))
        else:
            read = (read_picture(self.folder / picture["file_name"]) for picture in self.coco.loadImgs(which))
        pending: list[Tensor] = []
        for picture in read:
            pending.append(self.network.prepare(picture))
            if len(pending) == batch:
                yield torch.stack(pending)
                pending = []
        if pending:
            yield torch.stack(pending)

    def keep(self, output: Tensor, first: int) -> list[list[dict]]:
        """The detections of each picture, as COCO's results want them; `first` is the number of the batch's first picture."""
        kept, categories = [], self.network.categories(self.coco.getCatIds())
        pictures = self.coco.loadImgs(self.ids[first : first + len(output)])
        for picture, (boxes, scores, classes) in zip(pictures, self.network.detections(output.nan_to_num()), strict=True):
            boxes[:, 2:] -= boxes[:, :2]
            boxes /= torch.tensor(self.network.factors(picture["width"], picture["height"]) * 2)
            rows = zip(boxes.tolist(), scores.tolist(), classes.tolist())
            kept.append([{"image_id": picture["id"], "category_id": categories[c], "bbox": box, "score": score} for box, score, c in rows])
        return kept

    def judge(self, kept: list[list[dict]], reference: list[list[dict]]) -> Judgement:
        """AP and AP50; the interval of the drop of AP by a jackknife over groups of pictures."""
        ours, theirs = self._precisions(kept), self._precisions(reference)
        (ap, ap50), (float_ap, float_ap50) = ours[0], theirs[0]
        drops = [b[0] - a[0] for a, b in zip(ours[1:], theirs[1:], strict=True)]
        mean = sum(drops) / len(drops)
        half = 1.959964 * math.sqrt((len(drops) - 1) / len(drops) * sum((d - mean) ** 2 for d in drops))
        drop = float_ap - ap
        return {"ap": (ap, float_ap), "ap50": (ap50, float_ap50), "drop": (drop, 0.0), "drop_low": (drop - half, 0.0), "drop_high": (drop + half, 0.0)}

    def _precisions(self, kept: list[list[dict]]) -> list[tuple[float, float]]:
        """(AP, AP50) on all pictures, then on all but each group of them."""
        from pycocotools.cocoeval import COCOeval

        found = [detection for detections in kept for detection in detections]
        if not found:
            return [(0.0, 0.0)] * (1 + _GROUPS)
        groups = [set(self.ids[i::_GROUPS]) for i in range(_GROUPS)]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.coco, self.coco.loadRes(found), "bbox")
            evaluation.params.imgIds = self.ids
            evaluation.evaluate()
            results, matches = [], evaluation.evalImgs
            for left_out in (set(), *groups):
                evaluation.evalImgs = [None if match is None or match["image_id"] in left_out else match for match in matches]
                evaluation.accumulate()
                evaluation.summarize()
                results.append((float(evaluation.stats[0]), float(evaluation.stats[1])))
        return results


def camera_shaped(picture: Tensor, number: int) -> Tensor:
    """The picture cut to 4:3, every fourth to 3:4, as COCO's are: square ones would leave a letterbox without its padding."""
    height, width = picture.shape[1:]
    return picture[:, :, : height * 3 // 4] if number % 4 == 3 else picture[:, : width * 3 // 4]


def coco(name: str, weights: str | None, folder: str | None, calibrate_on: str | None, calibration: int | None, limit: int | None) -> Detection:
    """`folder` holds annotations/instances_val2017.json and val2017/; photographs that come with packages calibrate."""
    from pycocotools.coco import COCO

    import ssd
    import yolox

    if name not in ("yolox_nano", "ssd_mobilenet_v2"):
        raise ValueError(f"no detector {name!r}; there are yolox_nano and ssd_mobilenet_v2")
    if not folder or (name == "yolox_nano" and not weights):
        raise ValueError(f"{name} needs {'--weights FILE.onnx and ' if name == 'yolox_nano' else ''}--coco DIR")
    annotations = Path(folder) / "annotations" / "instances_val2017.json"
    if not annotations.is_file():
        raise FileNotFoundError(f"{folder} does not hold annotations/instances_val2017.json")
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO(str(annotations))
    calibrating = image_folder(calibrate_on) if calibrate_on else sum(bundled_photographs()[1:], bundled_photographs()[0])
    both = {path.name for path in calibrating.paths} & {picture["file_name"] for picture in index.loadImgs(index.getImgIds())}
    if both:
        raise ValueError(f"{len(both)} pictures would calibrate and be evaluated, such as {min(both)}")
    network, model = (yolox, yolox.yolox_nano(weights)) if name == "yolox_nano" else (ssd, ssd.ssd_mobilenet_v2(weights))
    return Detection(name, model, network, calibrating.sample(calibration), index, Path(folder) / "val2017", sorted(index.getImgIds())[:limit])


# ----------------------------------------------------------------------------------------------------------------------
# Saliency


@dataclass
class Saliency:
    """Pictures without labels, and what draws the eye in them: a mask that a float decoder makes of a transformer's tokens."""

    name: str
    model: nn.Module
    decoder: nn.Module
    preprocessing: Preprocessing
    calibration: ImageSet
    evaluation: ImageSet

    @property
    def training(self) -> ImageSet:
        return self.calibration

    def normalize(self, pictures: Tensor) -> Tensor:
        return self.preprocessing.normalize(pictures)

    def pictures(self, which: ImageSet, batch: int, size: int | None = None) -> Iterator[Tensor]:
        if size is not None:
            raise ValueError(f"the shift size:PIXELS is for classification: {self.name} has positions for {self.preprocessing.crop} x {self.preprocessing.crop} pixels")
        yield from which.batches(self.preprocessing, batch)

    def keep(self, output: Tensor, first: int) -> list[Tensor]:
        """Each picture's mask: the half of its pixels that is the most salient. (Few pictures reach the map's own threshold of 0.5.)"""
        logits = self.decoder(output.nan_to_num()).flatten(1)
        return list(logits > logits.median(1, keepdim=True).values)

    def judge(self, kept: list[Tensor], reference: list[Tensor]) -> Judgement:
        """Intersection over union with float32's mask, mean over pictures, and the interval of the mean."""
        shares = torch.tensor([float((ours & theirs).sum() / (ours | theirs).sum().clamp(min=1)) for ours, theirs in zip(kept, reference, strict=True)])
        mean, half = float(shares.mean()), 1.959964 * float(shares.std()) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
        return {"iou": (mean, 1.0), "drop": (1 - mean, 0.0), "drop_low": (1 - mean - half, 0.0), "drop_high": (1 - mean + half, 0.0)}


def saliency(name: str, weights: str | None, folder: str | None, calibrate_on: str | None, calibration: int | None, limit: int | None) -> Saliency:
    """Any pictures; `folder` may hold `calibration` and `validation`, as ImageNet's does."""
    import saliency as network

    if name != "vit_s_focus":
        raise ValueError(f"no saliency network {name!r}; there is vit_s_focus")
    if not folder:
        raise ValueError(f"{name} needs --imagenet DIR, pictures of any kind")
    calibrating, evaluating = split_pictures(folder, calibrate_on, limit)
    model, decoder = network.vit_s_focus(weights)
    return Saliency(name, model, decoder, network.PREPROCESSING, calibrating.sample(calibration), evaluating)

"""A classifier asked at every place of an image: what `pss-convert --token-labels` makes label maps with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.base import IMAGENET_MEAN, IMAGENET_STD
from pss.inference.opening import open_run
from pss.methods import Method
from pss.models.create import check_name
from pss.models.settings import KEY
from pss.models.vit import VisionTransformer

_TIMM = "timm:"
_MOST_LOGITS = 1 << 26
"""At a time: places of images times classes."""


class DenseTeacher:
    """A frozen classifier whose head reads the features of each place alone, as if they were those of a whole image.

    Of a convolutional network that is what global pooling is made of; of a Vision Transformer the tokens of the patches
    (Jiang et al., *All Tokens Matter*, NeurIPS 2021, section 3.2, where the teacher is an NFNet). It is
    `pipelines.labelling.making.MapTeacher`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        side: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        interpolation: str = "bicubic",
        classes: tuple[str, ...] | None = None,
        device: torch.device,
    ) -> None:
        """Raises `ValueError` for a model whose head cannot be asked place by place."""
        self.name, self.side, self.classes, self.device = name, side, classes, device
        self.resampling = int(Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC)
        self.model = model.eval().requires_grad_(False).to(device)
        self.digest = _digest(model)
        self._scale = (1 / (255 * torch.tensor(std))).view(3, 1, 1).to(device)
        self._shift = (torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(device)
        self._asked = _Ours(model) if isinstance(model, VisionTransformer) else _Theirs(model)
        try:
            logits, image = self._logits(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device))
        except (RuntimeError, TypeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"the classifier of {name} cannot be asked place by place ({str(error).splitlines()[0][:120]}); name a "
                "convolutional network or a plain Vision Transformer as teacher"
            ) from error
        self._own_grid = logits.shape[1], logits.shape[2]
        self.num_classes = int(image.shape[1])
        if logits.shape[3] != self.num_classes:
            raise ValueError(f"{name} tells other classes of places than of images; name another teacher")

    def grid(self, most: int | None) -> tuple[int, int]:
        """Rows and columns of the places that it tells of: its own, or fewer where those are more than `most`."""
        height, width = self._own_grid
        return (height, width) if most is None else (min(height, most), min(width, most))

    @torch.inference_mode()
    def __call__(
        self, images: NDArray[np.uint8], grid: tuple[int, int], top_k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """What it finds in images.

        Args:
            images: (B, side, side, 3).
            grid: See there. Between its own places and fewer ones, logits are averaged.
            top_k: How many classes to tell of each place.

        Returns:
            Their logits (B, top_k, *grid), largest first, and their numbers, alike; the class of each image (B,).
        """
        logits, image = self._logits(torch.from_numpy(images).to(self.device))
        best = image.argmax(1)
        if grid != self._own_grid:
            logits = F.interpolate(logits.permute(0, 3, 1, 2), grid, mode="bilinear", antialias=True).permute(
                0, 2, 3, 1
            )
        found = logits.topk(top_k, dim=-1)
        values, classes = (one.permute(0, 3, 1, 2).contiguous().cpu().numpy() for one in (found.values, found.indices))
        return values, classes, best.cpu().numpy()

    @torch.inference_mode()
    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of each place, float32 (B, h, w, K), and of the images, (B, K)."""
        seen = images.permute(0, 3, 1, 2).float() * self._scale - self._shift
        features, image = self._asked.see(seen)
        places = features.flatten(0, 2)
        at_once = max(1, _MOST_LOGITS // image.shape[1])
        logits = torch.cat([self._asked.read(places[at : at + at_once]) for at in range(0, len(places), at_once)])
        return logits.float().reshape(*features.shape[:3], -1), image.float()


def open_teacher(source: str, device: torch.device) -> DenseTeacher:
    """The classifier that `source` names.

    Args:
        source: `timm:NAME`, any classifier of timm with its published weights; `NAME=FILE`, a weights file and the timm
            model it belongs to; or a run, a checkpoint or a published folder (`pss.inference.opening.open_run`).
        device: Where to.

    Raises:
        ValueError: there is no such thing, or it cannot be asked place by place.
    """
    name, _, file = source.removeprefix(_TIMM).partition("=")
    plain = source.startswith(_TIMM) or (bool(file) and not Path(source).exists())
    if plain and not (file and _is_ours(name)):
        return _open_timm(source, name, file, device)
    run = open_run(source, device)
    if type(run.method).predict is not Method.predict:
        raise ValueError(
            f"{source} predicts in the way of method {run.method.name}, which is not asked of places; name a run of "
            "method dense or sampled as teacher"
        )
    data = run.config.data
    return DenseTeacher(
        source,
        run.method.model,
        side=data.img_size,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
        classes=None if run.classes is None else tuple(run.classes),
        device=device,
    )


def _is_ours(name: str) -> bool:
    """Whether `open_run` builds models of that name."""
    try:
        check_name(name)
    except ValueError:
        return False
    return True


def _open_timm(source: str, name: str, file: str, device: torch.device) -> DenseTeacher:
    try:
        known: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
        model = _filled(name, file, known) if file else timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub's client or timm raise
        if isinstance(error, ValueError) and file:
            raise
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"timm gives no pretrained weights for {name} ({reason}); name a weights file as {name}=FILE, or a run"
        ) from error
    told = getattr(model, "pretrained_cfg", None) or {}
    subset = None if file else infer_imagenet_subset(told)
    return DenseTeacher(
        source,
        model,
        side=int((told.get("test_input_size") or told.get("input_size") or (3, 224, 224))[-1]),
        mean=tuple(told.get("mean") or IMAGENET_MEAN),
        std=tuple(told.get("std") or IMAGENET_STD),
        interpolation=str(told.get("interpolation") or "bicubic"),
        classes=None if subset is None else tuple(ImageNetInfo(subset).label_names()),
        device=device,
    )


def _filled(name: str, file: str, known: Any) -> nn.Module:
    """timm's model of that name with the weights of a file, which tells the number of classes."""
    if not Path(file).is_file():
        raise ValueError(f"there is no weights file {file[:200]}; name one, as in NAME=FILE")
    try:
        weights = load_state_dict(file, device="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle fail the reader in any way they like
        raise ValueError(
            f"{file} cannot be read as plain weights; save a state dict alone, with torch.save or as safetensors"
        ) from error
    heads = known.classifier if known is not None else "head"
    head = heads if isinstance(heads, str) else heads[0]
    if f"{head}.weight" not in weights:
        raise ValueError(f"{file} has no classifier {head}.weight; name a file of a whole {name}")
    try:
        model: nn.Module = timm.create_model(name, num_classes=len(weights[f"{head}.weight"]))
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{file} is not of a {name} ({str(error).strip().splitlines()[-1].strip()[:120]}); name the model that it "
            "belongs to, as in NAME=FILE"
        ) from error
    return model


class _Ours:
    """A backbone of `pss`: what is asked is its classifier of patches, where it has one."""

    def __init__(self, model: VisionTransformer) -> None:
        self._model = model

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of each place, (B, h, w, D), and logits of the images."""
        tokens = self._model.trunk(*self._model.see(images, 1.0))
        patches = tokens[:, self._model.num_prefix_tokens :]
        features = patches.reshape(len(patches), *self._model.grid_size, -1)
        return features, self._model.readout(tokens)

    def read(self, features: Tensor) -> Tensor:
        """Logits of features (P, D)."""
        image, patches = self._model.answers(_as_tokens(features, self._model.num_prefix_tokens))
        return image if patches is None else patches[:, 0]


class _Theirs:
    """Any classifier of timm's, by what its features look like."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._prefix = int(getattr(model, "num_prefix_tokens", hasattr(model, "cls_token")))
        self._tokens = False

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `_Ours.see`."""
        features = self._model.forward_features(images)
        logits = self._model.forward_head(features)
        assert isinstance(features, Tensor), "its features are no tensor"
        assert features.ndim in (3, 4), "its features are no grid"
        self._tokens = features.ndim == 3
        if self._tokens:
            side = round(max(0, features.shape[1] - self._prefix) ** 0.5)
            assert side > 0, "its tokens are not of patches"
            assert self._prefix + side**2 == features.shape[1], "its tokens are no square of patches"
            return features[:, self._prefix :].reshape(len(features), side, side, -1), logits
        return features if self._last else features.permute(0, 2, 3, 1), logits

    def read(self, features: Tensor) -> Tensor:
        """As `_Ours.read`."""
        places = features[:, None, None] if self._last else features[:, :, None, None]
        logits: Tensor = self._model.forward_head(_as_tokens(features, self._prefix) if self._tokens else places)
        return logits


def _as_tokens(features: Tensor, num_prefix: int) -> Tensor:
    """Each place as an image that consists of it: whichever tokens the head reads, they are those of the place."""
    return features[:, None].expand(-1, num_prefix + 1, -1)


def _digest(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers."""
    content = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name != KEY:
            content.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()

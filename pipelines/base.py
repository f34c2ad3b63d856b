"""The contract every data loader fulfils, and the settings they share.

A loader turns one split of a data set into uint8 batches, which lie where they were decoded: on the host, in pinned
memory if they are meant for a GPU, or on that. What it delivers is a pure function of
(data set, settings, seed, epoch, rank, world size): order, crops and flips do not depend on the number of threads,
on the back end or on where an interrupted run was resumed. Everything after the crop (flip, normalisation, mixing)
happens once, for all back ends, in `pipelines.augment.device`.

Legend: B images per rank and step, S image side in pixels, which may be another one in each epoch of training.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from annotated_types import Ge, Le

from pipelines.rand_augment import RandAugmentSpec
from pipelines.settings import (
    Always,
    Context,
    Natural,
    Parsed,
    Probability,
    ReadIf,
    Remedy,
    Section,
    Share,
    Text,
)

if TYPE_CHECKING:  # conversion, and the processes it starts, need no torch
    import torch
    from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]
Backend = Literal["auto", "torch", "dali", "ffcv"]

MAX_COPIES = 256
COPY_SHIFT = 48
"""Where a copy's number lies in a draw key, above that of its sample."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DataError(ValueError):
    """The data set, or one of its files, cannot be used; the message names it and the remedy."""


_REASONS = {
    errno.ENOSPC: "no space left on that disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "read-only file system",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a file is in the way",
    errno.EEXIST: "a file is in the way",
    errno.EISDIR: "it is a folder",
    errno.ENOTEMPTY: "something else is in it",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.ENOENT: "it is not there",
    errno.ELOOP: "its links go in circles",
    errno.EFBIG: "too large a file for that disk",
    errno.EIO: "the disk reports an error",
    errno.ENXIO: "the device is not there",
    errno.ESTALE: "the file server no longer knows it",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.ENOMEM: "out of memory",
    errno.EPIPE: "nobody reads it any more",
}


def in_words(error: BaseException) -> str:
    """Why something failed, for a sentence that names the file: no `[Errno 28]`, no traceback, one line."""
    if isinstance(error, OSError) and error.errno is not None:
        told = _REASONS.get(error.errno) or error.strerror or type(error).__name__
    else:  # Pillow's messages name objects by their addresses
        told = re.sub(r"\s*<[^<>]* object at 0x[0-9a-f]+>", "", str(error)).strip() or type(error).__name__
    return " ".join(told.split())


def choose_loader(backend: Backend) -> str:
    """How to take this back end, for messages, in the words of the commands and of Python."""
    return f"--loader {backend} (in Python, loader={backend!r})"


_Side = Annotated[int, Ge(1), Le(1 << 14)]
"""In pixels."""
_Extent = Annotated[int, Ge(0), Le(1 << 16)]
_Ratio = Annotated[float, Ge(0.01), Le(100)]
_Mean = Annotated[float, Ge(0), Le(1)]
_Deviation = Annotated[float, Ge(1e-3), Le(4)]
_Copies = Annotated[int, Ge(1), Le(MAX_COPIES)]
_UNIT_SCALE = Remedy("on the 0-1 scale: divide values on the 0-255 scale by 255")


def _on_gpu(at: Context) -> bool:
    """While neither is known, a setting may yet be read. Validation counts, which is DALI's where FFCV trains."""
    return at.device in (None, "cuda") and (at.backends is None or "dali" in at.backends)


_BY_DALI = ReadIf(_on_gpu, "--loader dali on a GPU")
_BY_DALIS_GPU = ReadIf(lambda at: at.own.cpu_share < 1, "data.gpu_decoding.cpu_share below 1")
_BY_DENSE_LOSSES = ReadIf(lambda at: "maps" in at.method.wants(at.run), "a method that learns from label maps")
_IN_WINDOWS = ReadIf(lambda at: at.own.window is not None, "data.window")
_WHERE_IMAGES_GROW = ReadIf(lambda at: at.own.start_size is not None, "data.progressive.start_size")


@dataclass(frozen=True, kw_only=True)
class GpuDecoding(Section, section="data.gpu_decoding"):
    """Who decodes JPEG files when DALI works on a GPU. It decides neither order nor crops, and changes pixels by what
    decoders differ in; without a GPU nothing reads it."""

    hardware_load: Annotated[Probability, _BY_DALI, _BY_DALIS_GPU] = 0.65
    """Share of the GPU's images that its JPEG engines decode, where it has them; the rest is decoded by its cores."""
    cpu_share: Annotated[Probability, _BY_DALI] = 0.0
    """Share of every batch's images that the CPU decodes."""
    pipelines: Annotated[int, Ge(1), Le(64), _BY_DALI] = 1
    """DALI pipelines that take turns with the batches; each has threads, and memory on the GPU, of its own."""
    preallocate: Annotated[tuple[_Extent, _Extent], _BY_DALI, _BY_DALIS_GPU] = (0, 0)
    """Height and width in pixels of an image for which the JPEG engines set aside memory at the start, not when one
    that large comes."""


@dataclass(frozen=True, kw_only=True)
class Progressive(Section, section="data.progressive"):
    """Progressive resizing: training begins with small images, which grow to `data.img_size`. Sizes are constant within
    an epoch; evaluation always takes images of full size."""

    in_epochs = ("begin_epoch", "end_epoch")

    start_size: Always[_Side | None] = None
    """Side of the first epochs' images in pixels; None trains at full size throughout."""
    begin_epoch: Annotated[Natural, _WHERE_IMAGES_GROW] = 0
    """Epochs at the first size, after which images grow."""
    end_epoch: Annotated[Natural, _WHERE_IMAGES_GROW] = 0
    """The first epoch of full size."""
    multiple: Annotated[_Side, _WHERE_IMAGES_GROW] = 32
    """The sizes between are multiples of this, rounded down."""

    def check(self) -> None:
        if self.start_size is None:
            return
        if not 0 <= self.begin_epoch <= self.end_epoch or self.end_epoch == 0:
            raise ValueError(
                f"data.progressive grows from epoch {self.begin_epoch} to {self.end_epoch}; set begin_epoch and a "
                "later end_epoch, the first one at full size"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, section="data"):
    """How images become model inputs. The same for every loader."""

    img_size: Always[_Side] = 224
    """Side of the square model input, in pixels."""
    crop_scale: Always[tuple[Share, Share]] = (0.08, 1.0)
    """Range of the random crop's area, as a share of the image's (training)."""
    crop_ratio: Always[tuple[_Ratio, _Ratio]] = (3 / 4, 4 / 3)
    """Range of the random crop's aspect ratio, width over height (training)."""
    flip: Always[Probability] = 0.5
    """Probability of a horizontal flip (training)."""
    interpolation: Always[Interpolation] = "bicubic"
    """Resampling filter of the torch and DALI loaders, and of what RandAugment rotates, shears and shifts. FFCV's
    crops always average areas."""
    rand_augment: Always[Annotated[str, Parsed(RandAugmentSpec.parse)] | None] = None
    """RandAugment in timm's notation, for example rand-m9-mstd0.5-inc1-n2 (training)."""
    three_augment: Always[bool] = False
    """DeiT III's choice of grey, solarised or blurred, then colour jitter, in RandAugment's place (training)."""
    erasing: Always[Probability] = 0.0
    """Probability of overwriting a rectangle with noise (training)."""
    repeats: Always[_Copies] = 1
    """Training: copies of each sample in an epoch, spread over the ranks, each with its own crop, flip and further
    augmentation (repeated augmentation, as DeiT uses it with 3). An epoch keeps its number of steps, and so shows
    about 1/repeats of the samples."""
    decode_once: Always[_Copies] = 1
    """Training: crops cut from each image that is decoded, all in the same batch, whose size counts the crops. An epoch
    keeps its number of steps. Saves decoding; excludes `repeats`."""
    crop_pct: Always[Annotated[float, Ge(0.01), Le(1)]] = 0.875
    """Evaluation: the shorter side is resized to floor(img_size / crop_pct), then the centre is cropped."""
    mean: Annotated[Always[tuple[_Mean, _Mean, _Mean]], _UNIT_SCALE] = IMAGENET_MEAN
    """Channel means on the 0-1 scale, subtracted on the device."""
    std: Annotated[Always[tuple[_Deviation, _Deviation, _Deviation]], _UNIT_SCALE] = IMAGENET_STD
    """Channel standard deviations on the 0-1 scale."""
    label_maps: Annotated[Text | None, _BY_DENSE_LOSSES] = None
    """Training: a .npy file with a label map for each training image, in the order of the split, for methods that learn
    from them; `auto` is what `pss-convert DATA --token-labels TEACHER` has made."""
    # The largest is more than any machine has.
    prefetch_gb: Always[Annotated[float, Ge(0), Le(1 << 14)] | None] = None
    """Training: memory per process for batches that are kept ready, in GB (10^9 bytes), so that short steps can draw on
    what long ones left time for; 0 keeps none, None is 4 where a GPU trains and 0.5 elsewhere. On a GPU two of them are
    augmented, each as large as four that are not. `--plan` and `--doctor` say what more of it buys."""
    window: Always[Annotated[int, Ge(1), Le(1 << 20)] | None] = None
    """Training: the windowed order, for sets that do not fit on the disk: tars that each group of them takes at a time,
    and permutes the samples of; None permutes all samples. Needs a converted set; docs/remote.md says what it costs."""
    groups: Annotated[int, Ge(1), Le(1 << 20), _IN_WINDOWS] = 64
    """Groups that tars are dealt into, each of which gives an equal part of every batch. Any number of processes that
    divides it gets the same batches, and reads the tars of its own groups alone."""
    progressive: Progressive = Progressive()
    """Smaller images in the first epochs (training)."""
    gpu_decoding: GpuDecoding = GpuDecoding()
    """For the DALI loader on a GPU."""

    def check(self) -> None:
        if (start := self.progressive.start_size) is not None and start > self.img_size:
            raise ValueError(f"data.progressive.start_size is {start}, above data.img_size ({self.img_size})")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale is {self.crop_scale}; it must be (low, high) with 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"data.crop_ratio is {self.crop_ratio}; it must be (low, high) with 0 < low <= high")
        if self.rand_augment is not None and self.three_augment:
            raise ValueError("data.rand_augment and data.three_augment are both set; choose one of them")
        if self.repeats > 1 and self.decode_once > 1:
            raise ValueError(
                f"data.repeats is {self.repeats} and data.decode_once {self.decode_once}; set one of them to 1"
            )

        if self.window is not None and self.repeats > 1:
            raise ValueError(
                f"data.repeats is {self.repeats} and data.window {self.window}: copies go to all processes, and the "
                "samples of a window to one; set data.repeats=1, and data.decode_once for several crops"
            )

    def prefetch_bytes(self, device: str) -> int:
        """`prefetch_gb` as a number of bytes, for a kind of device."""
        usual = 4.0 if device == "cuda" else 0.5
        return round(1e9 * (usual if self.prefetch_gb is None else self.prefetch_gb))

    def train_size(self, epoch: int) -> int:
        """Side of the training images of `epoch`, in pixels: `img_size`, or what progressive resizing makes of it."""
        grow = self.progressive
        if grow.start_size is None or epoch >= grow.end_epoch:
            return self.img_size
        if epoch < grow.begin_epoch:
            return grow.start_size
        done, of = epoch + 1 - grow.begin_epoch, grow.end_epoch + 1 - grow.begin_epoch
        size = grow.start_size + (self.img_size - grow.start_size) * done // of
        return max(grow.start_size, size // grow.multiple * grow.multiple)


@dataclass(frozen=True)
class View:
    """What each row of a batch shows of its stored image: a window, perhaps mirrored.

    The window is in the frame of the stored image, which is not mirrored: pixel (i, j) of the S x S that are shown lies
    in it at top + height (i + 1/2) / S and left + width (j + 1/2) / S, mirrored at left + width - width (j + 1/2) / S.

    A view is of the images it comes with. A loader's images are yet to be flipped, so in its view nothing is; it lies
    on the host. The view that `DeviceTransform.with_view` returns is of the images returned with it, on their device.
    What RandAugment rotates, shears or shifts after the flip is in `moves`.
    """

    crop: Tensor
    """float32 (B, 4): top, left, height, width of the window, as shares (0-1) of the height and width of the image as
    it is stored, EXIF orientation ignored. In float32, top + height and left + width are at most 1. It is the planned
    window, the same for every back end: FFCV rounds it outwards to whole pixels of its smaller copy. In evaluation,
    what the centre crop leaves of the resized image."""
    flipped: Tensor
    """bool (B,): whether the window is shown mirrored left to right."""
    moves: Tensor | None = None
    """float32 (B, L, 2, 3): what moved the window, mirrored or not, before it was shown, one move after the other; None
    where nothing did. Point (x, y) of what a move made, in shares of its sides, shows (a x + b y + c, d x + e y + f) of
    what it was given, its rows being (a, b, c) and (d, e, f); where that is outside of 0 ... 1, it shows nothing."""

    def chunk(self, parts: int) -> list[View]:
        """As `Tensor.chunk`, along the batch."""
        moves = [None] * parts if self.moves is None else self.moves.chunk(parts)
        return [View(*some) for some in zip(self.crop.chunk(parts), self.flipped.chunk(parts), moves, strict=True)]


@dataclass(frozen=True)
class Batch:
    """One step's images on one rank. The tensors belong to the receiver: no loader overwrites them later."""

    images: Tensor  # uint8 (B, 3, S, S), RGB, cropped and resized, not yet flipped
    labels: Tensor  # int64 (B,)
    index: Tensor  # int64 (B,), the sample's position in the split; on the host, where random numbers are drawn
    copy: Tensor | None = None  # int64 (B,), on the host: which of the sample's copies; None where each comes once
    view: View | None = None  # of `images`; every loader gives it, a batch made by hand may go without
    maps: Tensor | None = None  # (B, ...), the samples' label maps, beside the labels; None where there are none

    @property
    def draw_keys(self) -> Tensor:
        """int64 (B,), on the host: give it, in place of `index`, to whatever draws random numbers per image.

        It is `index` for copy 0 of every sample, and another number for each further copy.
        """
        return self.index if self.copy is None else self.index | self.copy << COPY_SHIFT

    def to(self, device: torch.device) -> Batch:
        """Images, labels and label maps on `device`, all else where it is. Nothing waits for a GPU: what is copied to
        it goes from pinned memory, in the order of this thread's stream."""

        def moved(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        maps = None if self.maps is None else moved(self.maps)
        return replace(self, images=moved(self.images), labels=moved(self.labels), maps=maps)


@runtime_checkable
class Loader(Protocol):
    """Iterating yields the remaining batches of the epoch chosen by `set_epoch`.

    Training (`split="train"`): every rank delivers `steps_per_epoch` full batches; each sample at most once an epoch,
    the remainder that fills no global batch is left out (another one each epoch). Evaluation (any other split or
    `train=False`): samples in file order, rank r takes r, r + world, ...; the last batch may be short; every sample
    exactly once over all ranks.
    """

    backend: str
    num_classes: int
    num_samples: int  # in the split, over all ranks
    batch_size: int  # per rank
    steps_per_epoch: int  # batches this rank delivers in an epoch

    @property
    def delivered_hash(self) -> int:
        """32-bit hash of the samples and copies delivered in the current epoch, with those before `start_step`.

        At the end of an epoch it equals `planned_hash(epoch)`, wherever the epoch was begun. It takes no account of
        order; hashes of all ranks add up modulo 2^32.
        """
        ...

    def planned_hash(self, epoch: int) -> int:
        """What `delivered_hash` must be at the end of `epoch`: a function of the settings alone."""
        ...

    def set_parts(self, parts: int) -> None:
        """Have every training batch of this rank consist of those that ranks rank * parts, rank * parts + 1, ... would
        get among world_size * parts, one after the other; 1 at first. `ValueError` where that cannot be."""
        ...

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose what the next iteration delivers: `epoch`, from its batch `start_step` on."""
        ...

    def __len__(self) -> int:
        """`steps_per_epoch`, wherever the next iteration starts."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """What must match for a resumed run to see the same data (plain numbers and strings, a few hundred bytes)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that `state` was taken from an equal loader; raise `DataError` naming the fields that differ."""
        ...

    def close(self) -> None:
        """Stop and join all threads and processes. May be called more than once."""
        ...

"""Augmentation of a whole batch on the training device: one implementation for every loader.

Every random number is a pure function of (seed, epoch, sample number), or, for mixing, of (seed, step, rank). They are
drawn on the host, so that nothing waits for the device. An image comes out the same whatever the batch it is in.

In the order of a training step:

    images = RandAugment(spec, seed=seed, fill=(124, 116, 104), interpolation="bicubic")(images, index, epoch)  # uint8
    ...  # to float32, normalised
    images = RandomErasing(0.25, seed=seed)(images, index, epoch)
    images, targets = Mixing(config, num_classes, seed=seed, rank=rank, label_smoothing=0.1)(images, labels, step)
"""

from pipelines.augment.erasing import RandomErasing
from pipelines.augment.mixing import Mixing, MixingConfig
from pipelines.augment.policy import RandAugment, ThreeAugment
from pipelines.rand_augment import RandAugmentSpec

__all__ = ["Mixing", "MixingConfig", "RandAugment", "RandAugmentSpec", "RandomErasing", "ThreeAugment"]

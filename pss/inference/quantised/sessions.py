"""Exported ONNX files, run by onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pss.inference.export import METADATA


class Session:
    """A file as a function."""

    def __init__(self, content: bytes, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        about = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA])
        self.counts: dict[str, int] = about["num_patches"]
        """Patches by ρ: one entry, or where ρ is free, several."""
        self._free = about["rho"] == "dynamic"
        self.bytes = len(content)

    def feed(self, images: NDArray[np.float32], rho: str) -> dict[str, Any]:
        """What a call takes for images (B, 3, S, S)."""
        return {"images": images} | ({"num_patches": np.array(self.counts[rho])} if self._free else {})

    def feeds(self, images: NDArray[np.float32], batch: int) -> Iterator[dict[str, Any]]:
        """What calls take for all images in batches, at every ρ."""
        for begin in range(0, len(images), batch):
            for rho in self.counts:
                yield self.feed(images[begin : begin + batch], rho)

    def logits(self, images: NDArray[np.float32], rho: str) -> NDArray[np.float32]:
        """(B, classes)."""
        found: NDArray[np.float32] = self._session.run(None, self.feed(images, rho))[0]
        return found

    def classes(self, images: NDArray[np.float32], batch: int) -> NDArray[np.int64]:
        """The likeliest class of each image, at every ρ; in the order of `feeds`, for comparisons."""
        runs = (self._session.run(None, feed)[0].argmax(1) for feed in self.feeds(images, batch))
        return np.concatenate(list(runs))

"""ONNX files whose weights and activations are of 8 bits, made of exported ones with images to calibrate them on.

Linear layers are quantised. Attention, normalisation and softmax stay as they are, and so does the embedding, whose
magnitudes decide which patches are kept: the same ones as in float32. Activations are of 8 bits without a sign, weights
of 7 with one: with 8, sums of two products overflow 16 bits on processors without VNNI, which no measurement on another
machine would tell.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pss.inference.export import METADATA
from pss.inference.quantised.sessions import Session

Kind = Literal["static", "dynamic"]

NUM_IMAGES = 512
"""To calibrate on, and to choose by: half of them each."""

_LINEAR = ["MatMul", "Gemm"]
_BATCH = 16
_LEAD = 0.01
_READY = "onnx.quant.pre_process", "onnxruntime.quant"
"""Without this entry onnxruntime warns that it was not asked to prepare the file, which is optimised already."""


@dataclass(frozen=True)
class Quantised:
    """A file, and how it was chosen."""

    content: bytes
    kind: Kind
    """Whether the ranges of activations are those of the calibration images, or looked up in each call."""
    agreement: dict[Kind, float]
    """Share of the images, at every ρ of the file, that each kind takes for what the float file takes them for."""
    num_calibrated: int
    num_compared: int


def quantise(content: bytes, images: NDArray[np.float32], threads: int) -> Quantised:
    """The int8 form of an exported ONNX file.

    Of two kinds it is the static one, unless the other agrees with the float file by a point more often: each call then
    spares looking for the ranges of its activations.

    Args:
        content: Of the exported file.
        images: As evaluation prepares them, (N, 3, S, S): every other one calibrates, the others choose.
        threads: For onnxruntime.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"--int8 needs two images at least, and --data gave {len(images)}; name a larger data set")
    calibrating, comparing = images[::2], images[1::2]
    exported = Session(content, threads)
    expected = exported.classes(comparing, _BATCH)
    made: dict[Kind, bytes] = {}
    agreement: dict[Kind, float] = {}
    kinds: tuple[Kind, ...] = ("static", "dynamic")
    for kind in kinds:
        made[kind] = _told(_quantised(content, kind, exported.feeds(calibrating, _BATCH)), kind, len(calibrating))
        agreement[kind] = float((Session(made[kind], threads).classes(comparing, _BATCH) == expected).mean())
    chosen: Kind = "dynamic" if agreement["dynamic"] >= agreement["static"] + _LEAD else "static"
    return Quantised(made[chosen], chosen, agreement, len(calibrating), len(comparing))


def _quantised(content: bytes, kind: Kind, feeds: Iterator[dict[str, Any]]) -> Any:
    """An ONNX model."""
    import onnx
    from onnxruntime import quantization

    model = onnx.load_model_from_string(content)
    del model.graph.value_info[:]  # shapes are inferred anew: of what is transposed, the old ones are wrong
    model.metadata_props.add(key=_READY[0], value=_READY[1])
    options: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": True,
        "weight_type": quantization.QuantType.QInt8,
        "extra_options": {"MatMulConstBOnly": True},
    }

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if kind == "dynamic":
            quantization.quantize_dynamic(model, path, op_types_to_quantize=_LINEAR, **options)
        else:
            quantization.quantize_static(
                model,
                path,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                op_types_to_quantize=_LINEAR,
                **options,
            )
        return onnx.load(path)


def _told(model: Any, kind: Kind, num_calibrated: int) -> bytes:
    """The file, which says of itself that it is quantised."""
    from onnx.helper import set_model_props

    words = {entry.key: entry.value for entry in model.metadata_props}
    quantised = {"bits": 8, "kind": kind} | ({"calibration_images": num_calibrated} if kind == "static" else {})
    whole = json.loads(words[METADATA]) | {"quantised": quantised}
    del model.metadata_props[:]
    known = {name: value for name, value in words.items() if name in whole}
    set_model_props(model, known | {"quantised": json.dumps(quantised), METADATA: json.dumps(whole)})
    content: bytes = model.SerializeToString()
    return content

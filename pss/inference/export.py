"""Models as files that run without pss: `torch.export` programs (`.pt2`) and ONNX.

The choice of the patches by magnitude is part of the graph. The batch size is free. The share of patches is fixed, or
there is another input, `num_patches`: a scalar int64, how many patches to keep. Weights and images are float32.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipelines.base import DataConfig
from pipelines.extras import need
from pss.inference.opening import Run
from pss.methods import Method, Point
from pss.models import settings
from pss.models.settings import TrainedOn
from pss.models.vit import VisionTransformer
from pss.runtime import files
from pss.version import __version__

LEVELS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of patches at which a file with a free one is compared with the model it was made from."""

METADATA = "pss.json"
"""The metadata's name in a file. ONNX files also carry them under their own keys, as older ones did alone."""

_TOLERANCE = 1e-4
_OPSET = 18
_IR_VERSION = 8
"""The lowest that has this opset: it came with ONNX 1.13, which onnxruntime reads from 1.14 on."""
_MOST_BYTES = 2**31 - 2**20  # of a protocol buffer, less what is no weights


def export(
    run: Run, path: Path, *, point: Point, dynamic: bool = False, more: Mapping[str, Any] | None = None
) -> float:
    """Write a run's model to `path`, and compare what the file computes with what the model does.

    Args:
        run: Its method is moved to the CPU.
        path: A `.pt2` or `.onnx` file.
        point: The operating point; None for a method that has none to choose.
        dynamic: Leave the number of patches to be chosen at each call instead.
        more: What else its metadata are to hold.

    Returns:
        The largest difference of a logit, over batches of two sizes, and over five shares of patches if it is free.

    Raises:
        ValueError: another suffix, a method that gives no module to export, packages that are missing, a model that is
            too large for ONNX, or a difference of more than 1e-4 (of the largest logit, where that is above 1).
        OSError: the file cannot be written; what was there before still is.
    """
    content, worst = made(run, path, point=point, dynamic=dynamic, more=more)
    files.write(path, content)
    return worst


def made(
    run: Run, path: Path, *, point: Point, dynamic: bool = False, more: Mapping[str, Any] | None = None
) -> tuple[bytes, float]:
    """What `export` would write, and what it returns; raises `ValueError` as it does."""
    check_target(path)
    if path.suffix == ".onnx" and (size := sum(one.nbytes for one in run.method.state_dict().values())) > _MOST_BYTES:
        raise ValueError(
            f"--export {path}: the model takes {size / 2**30:.1f} GiB, and an ONNX file holds 2 at most; "
            "name a file that ends in .pt2"
        )
    method = run.method.cpu().float().eval()
    try:
        module = method.export_dynamic() if dynamic else method.export_module(point)
    except ValueError as error:
        raise ValueError(f"{run.name} cannot be exported: {error}") from None
    metadata = describe(method, run.config.data, run.classes, point, dynamic=dynamic) | dict(more or {})
    program = _trace(module.eval(), method.model, dynamic=dynamic, explicit_attention=path.suffix == ".onnx")
    # Made in memory: torch's own writer ends the process where the disk is full.
    content = _pt2(program, metadata) if path.suffix == ".pt2" else _onnx(program, metadata, dynamic=dynamic)
    return content, _compare(method, path, content, LEVELS if dynamic else (point,), dynamic=dynamic)


def check_target(path: Path) -> None:
    """Raise `ValueError` for a file that cannot be written here."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--export {path}: name a file that ends in .onnx or .pt2")
    if path.suffix == ".onnx":
        need(f"--export {path}", "export", "onnx", "onnxscript", "onnxruntime")


def describe(
    method: Method, data: DataConfig, classes: Sequence[str] | None, point: Point, *, dynamic: bool
) -> dict[str, Any]:
    """The metadata of a file: what its user must know to prepare images and to read its answers."""
    model = method.model
    tokens = {level: method.tokens(level) for level in (LEVELS if dynamic else (point,))}
    built = {key: value for key, value in settings.describe(model).items() if key not in vars(TrainedOn())}
    return {
        "pss_version": __version__,
        "model": {"name": method.config.model.name} | built,
        "classes": list(classes) if classes is not None else [str(number) for number in range(model.num_classes)],
        "img_size": data.img_size,
        "crop_pct": data.crop_pct,
        "interpolation": data.interpolation,
        "mean": list(data.mean),
        "std": list(data.std),
        "rho": "dynamic" if dynamic else point,
        "num_patches": {
            "as trained" if level is None else f"{level:g}": max(counts) - model.num_prefix_tokens
            for level, counts in tokens.items()
        },
        "max_patches": model.num_patches,
    }


def _trace(module: nn.Module, model: VisionTransformer, *, dynamic: bool, explicit_attention: bool) -> Any:
    size = model.image_size
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    images = torch.zeros(2, 3, *size)
    inputs: tuple[Tensor, ...] = (images,)
    shapes: tuple[Any, ...] = ({0: batch},)
    if dynamic:
        inputs, shapes = (images, torch.tensor(max(1, model.num_patches // 2))), (*shapes, None)
    if not explicit_attention:
        return torch.export.export(module, inputs, dynamic_shapes=shapes)
    with _ExplicitAttention():
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


class _ExplicitAttention(TorchFunctionMode):
    """Writes attention out in plain operations.

    ONNX has to be told them anyway, and torch's own account of its kernels promises another memory layout than the
    operations yield, which the exporter stumbles over where the number of tokens is free.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    scale: float | None = None,
) -> Tensor:
    assert dropout_p == 0
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(dim=-1) @ v


def _pt2(program: Any, metadata: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA: json.dumps(metadata)})
    return content.getvalue()


def _onnx(program: Any, metadata: dict[str, Any], *, dynamic: bool) -> bytes:
    import onnx
    from onnxscript import opset18 as op

    def stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        length = op.Reshape(op.Gather(op.Shape(x), dim, axis=0), op.Constant(value_ints=[1]))
        return op.TopK(x, length, axis=dim, largest=descending, sorted=True)  # of equals the lower index comes first

    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=_OPSET,
        input_names=["images", "num_patches"] if dynamic else ["images"],
        output_names=["logits"],
        custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
        verbose=False,
    )
    assert written is not None
    model = written.model_proto
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, words | {METADATA: json.dumps(metadata)})
    model.ir_version = _IR_VERSION
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _compare(method: Method, path: Path, content: bytes, points: Sequence[Point], *, dynamic: bool) -> float:
    """The largest difference of a logit between what a file is to hold and the method; `ValueError` if it is too
    large."""
    call, model = _open(path.suffix, content), method.model
    generator = torch.Generator().manual_seed(0)
    worst = largest = 0.0
    for batch in (1, 3):
        images = torch.randn(batch, 3, *model.image_size, generator=generator)
        for point in points:
            with torch.inference_mode():
                expected = method.predict(images, point).numpy()
            count = max(method.tokens(point)) - model.num_prefix_tokens if dynamic else None
            found = call(images.numpy(), count)
            worst = max(worst, float(np.abs(found - expected).max()))
            largest = max(largest, float(np.abs(expected).max()))
    if not worst <= _TOLERANCE * max(1.0, largest):
        raise ValueError(
            f"--export {path} would differ from the model by {worst:.2g}, which is more than {_TOLERANCE:g}; it was "
            "not written: try the other kind of file (.onnx, .pt2), or report it"
        )
    return worst


def _open(suffix: str, content: bytes) -> Any:
    """What a file holds as a function of images (B, 3, S, S) and the number of patches, if that is free."""
    if suffix == ".pt2":
        program = torch.export.load(io.BytesIO(content)).module()

        def call_program(images: Any, count: int | None) -> Any:
            inputs = [torch.from_numpy(images)] + ([] if count is None else [torch.tensor(count)])
            with torch.inference_mode():
                return program(*inputs).numpy()

        return call_program
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def call_session(images: Any, count: int | None) -> Any:
        inputs = {"images": images} | ({} if count is None else {"num_patches": np.asarray(count)})
        return session.run(None, inputs)[0]

    return call_session

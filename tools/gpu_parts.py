"""What the parts of the GPU suite run, in the order of what they teach."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent

MODELS = {
    "deit-s-224": ("deit-s-224", "deit_small_patch16_224", 224, 1024),
    "vit-b-224": ("vit-b-simmim", "vit_base_patch16_224", 224, 512),
    "deit-s-384": ("deit-s-384", "deit_small_patch16_224", 384, 256),
}
"""Recipe, timm's model of that size, pixels and batch size, by the name in parts and goals. Each by itself should fit
into 80 GiB; a batch that does not is halved."""

TINY = ("deit-s-224", "vit_tiny_patch16_224", 32, 4)

VARIANTS = {"aligned": "model.token_counts=aligned", "cuda-graphs": "compile.cuda_graphs=true"}
"""Settings to compare, on the first model, with what is usual."""

NEEDED = ("torch", "torchvision", "timm", "numpy", "PIL", "pydantic", "typer", "rich", "tensorboard", "safetensors")
"""Modules that every part imports."""


@dataclass(frozen=True)
class Part:
    """One step of the suite."""

    command: Callable[[Path], list[str]]
    """A module and its arguments, given the folder for what it writes. An argument `--batch` may be halved."""
    limit_seconds: float
    """Longest it may take."""
    obstacle: Callable[[], str | None] = lambda: None
    """Why it cannot run here."""


class Parts:
    """The parts, as the arguments want them."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch = arguments, scratch
        self.dry: bool = arguments.dry_run
        self.device = "cpu" if self.dry else "cuda"
        self.models = {"tiny": TINY} if self.dry else MODELS

    def all(self) -> dict[str, Part]:
        """By name. Two calls of six minutes, on two machines that have compiled nothing, answer the first three."""
        first, *others = self.models
        parts = {
            "tests": Part(self._tests, 120, lambda: lacking("pytest", "pytest_timeout", "hypothesis")),
            f"rates-{first}": self._rates_of(first, 230),
            "train": Part(self._train, 340, self._obstacle_to_images),
        }
        for name in others:
            parts[f"rates-{name}"] = self._rates_of(name, 330)
        parts["attention"] = Part(self._attention, 120, lambda: lacking("triton"))
        for name in self.models:
            parts[f"step-{name}"] = Part(lambda folder, name=name: self._step(name, folder), 120, lacking)
        parts["augment"] = Part(self._augment, 60, lacking)
        parts["loaders"] = Part(self._loaders, 300, self._obstacle_to_images)
        for name, setting in VARIANTS.items():
            parts[f"rates-{first}-{name}"] = self._rates_of(first, 330, setting)
        return parts

    def _rates_of(self, name: str, limit: float, *settings: str) -> Part:
        def obstacle() -> str | None:
            return "its figures are for a GPU to compare" if self.dry and settings else lacking("triton")

        return Part(lambda folder: self._rates(name, folder, *settings), limit, obstacle)

    # What they run.

    def _tests(self, _: Path) -> list[str]:
        files = ["tests/pipelines/test_crng.py"] if self.dry else tests_on_a_gpu()
        return ["pytest", "-m", "gpu", "-q", "-rs", "--no-header", "-p", "no:cacheprovider", *files]

    def _training(self, name: str) -> list[str]:
        recipe, _, _, batch = self.models[name]
        return ["tools.benchmarks.training", "--device", self.device, "--recipe", recipe, "--batch", str(batch)]

    def _rates(self, name: str, folder: Path, *settings: str) -> list[str]:
        brief = ["--cycles", "1", "--cycle-steps", "3"] if self.dry else ["--cycles", "2"]
        return [*self._training(name), *self._set(*settings), "--json", str(folder / "rates.json"), *brief]

    def _train(self, folder: Path) -> list[str]:
        words = [*self._training(next(iter(self.models))), "--data", str(self.images), *self._set()]
        words += ["--seconds", "0.1" if self.dry else "60", "--cycle-steps", "2" if self.dry else "45"]
        return [*words, "--json", str(folder / "train.json")]

    def _set(self, *settings: str) -> list[str]:
        if self.dry:
            settings += (f"model.name={TINY[1]}", f"data.img_size={TINY[2]}")
            settings += ("model.patch_size=16", "model.embed_dim=16", "model.depth=1", "model.num_heads=1")
            settings += ("compile.mode=on", "compile.backend=aot_eager", "data.rand_augment=none", "schedule.low=0.8")
        return [word for setting in settings for word in ("--set", setting)]

    def _attention(self, folder: Path) -> list[str]:
        words = ["tools.benchmarks.attention", "--device", self.device, "--json", str(folder / "attention.json")]
        if self.dry:
            return [*words, "--lengths", "39", "--batch", "1", "--heads", "1", "--width", "16", "--rounds", "1"]
        return [*words, "--batch", "256", "--dtype", "bfloat16", "--rounds", "10"]

    def _step(self, name: str, folder: Path) -> list[str]:
        _, model, img_size, batch = self.models[name]
        words = ["tools.benchmarks.step", "--device", self.device, "--model", model, "--img-size", str(img_size)]
        words += ["--json", str(folder / "step.json")]
        if self.dry:
            return [*words, "--batch", "1", "--rounds", "1", "--beside", "none", "naive"]
        return [*words, "--batch", str(batch // 8), "--rounds", "5", "--bf16", "--beside", "none", "naive"]

    def _loaders(self, folder: Path) -> list[str]:
        words = ["tools.benchmarks.loader", "--data", str(self.images), "--json", str(folder / "loaders.json")]
        if self.dry:
            return [*words, "--img-size", "32", "--batch", "12", "--batches", "16", "--rounds", "1", "--threads", "1"]
        threads = len(os.sched_getaffinity(0))
        batches = max(48, 8 * threads)  # four times what timm's workers decode ahead
        words += ["--device", "cuda", "--batch", "128", "--batches", str(batches), "--rounds", "2"]
        return [*words, "--threads", str(threads)]

    def _augment(self, _: Path) -> list[str]:
        words = ["tools.benchmarks.augment", "--device", self.device]
        if self.dry:
            return [*words, "--batch", "2", "--rounds", "2", "--batches", "1"]
        return [*words, "--batch", "1024", "--rounds", "5", "--batches", "4"]

    # Images.

    def _obstacle_to_images(self) -> str | None:
        if not self.dry and self.arguments.images is None:
            return "there are no images; name a tar of JPEG files in class folders with --images"
        return lacking("triton")

    @cached_property
    def images(self) -> Path:
        """The pictures as train|val/<class>/*, each several times, so that an epoch is not over at once."""
        folder = self.scratch / "images"
        copies = 16 if self.dry else 170  # of 750 photographs: 124 batches of 1024
        for member, content in _drawn() if self.dry else _unpacked(self.arguments.images):
            first = folder / "val" / member
            first.parent.mkdir(parents=True, exist_ok=True)
            first.write_bytes(content)
            train = folder / "train" / Path(member).parent
            train.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                (train / f"{copy}-{first.name}").hardlink_to(first)
        if not self.dry:
            return folder
        # As tars, so that the benchmark of the loaders does not write FFCV files first.
        converted = self.scratch / "converted"
        command = [sys.executable, "-m", "cli.convert", str(folder), str(converted), "--format", "dali"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return converted


def lacking(*modules: str) -> str | None:
    """What to say where one of these, or of `NEEDED`, is not installed."""
    missing = [name for name in (*NEEDED, *modules) if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}; python -m tools.wheels fetches them" if missing else None


def tests_on_a_gpu() -> list[str]:
    """The files with tests that need one; others may import what is not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = "@pytest.mark." + "gpu\n"
    return [str(path.relative_to(ROOT)) for path in files if marked in path.read_text(encoding="utf-8")]


def halved(command: Sequence[str]) -> tuple[list[str], int, int] | None:
    """The command with half the `--batch`, what that was, and what it is; None where there is none, or it is 1."""
    words = list(command)
    if "--batch" not in words:
        return None
    place = words.index("--batch") + 1
    batch = int(words[place])
    if batch < 2:
        return None
    words[place] = str(batch // 2)
    return words, batch, batch // 2


def _unpacked(images: Path) -> Iterable[tuple[str, bytes]]:
    from tools.benchmarks.augment import unpacked  # which imports what may be lacking

    return unpacked(images)


def _drawn() -> Iterable[tuple[str, bytes]]:
    """Twelve small pictures of two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for number, coarse in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(coarse).resize((48, 40)).save(file, "JPEG")
        yield f"{'ab'[number % 2]}/{number}.jpg", file.getvalue()

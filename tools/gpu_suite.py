"""Everything that wants a GPU, in one command, in parts that are kept: tests, benchmarks, rates, a minute of training.

    python -m tools.gpu_suite --images imagenet-sample.tar

Every part runs in a process of its own and leaves `<output>/<part>.json`, whole or not at all; a run takes up those
that are missing or failed (`--again` all), and `--parts` chooses. A part that fails, or cannot run here, says why and
stops nothing. No part is begun that might not end within `--minutes`; run the command again for the rest. The report,
`<output>/report.md`, sets what was measured beside the goals.

`--images` is a tar of JPEG files in class folders. `--dry-run` runs every part on the CPU with tiny shapes, Triton
kernels in their interpreter: its figures mean nothing, only that the suite works.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tools.benchmarks.step import environment

ROOT = Path(__file__).parent.parent
TAIL = 2000  # characters kept of what a failed part said last

MODELS = {
    "deit-s-224": ("deit-s-224", "deit_small_patch16_224", 224, 1024),
    "vit-b-224": ("vit-b-simmim", "vit_base_patch16_224", 224, 512),
    "deit-s-384": ("deit-s-384", "deit_small_patch16_224", 384, 256),
}
"""Recipe, timm's model of that size, pixels and batch size, by the name in parts and goals. All three fit into 139 GiB
at once."""

TINY = ("deit-s-224", "vit_tiny_patch16_224", 32, 4)

VARIANTS = {"aligned": "model.token_counts=aligned", "cuda-graphs": "compile.cuda_graphs=true"}
"""Settings to compare, on the first model, with what is usual."""

GOALS = {
    ("rates-deit-s-224", "saving"): 0.345,
    ("rates-vit-b-224", "saving"): 0.342,
    ("rates-deit-s-384", "saving"): 0.364,
    ("rates-deit-s-224", "images/s at rho 1"): 10500,
    ("rates-vit-b-224", "images/s at rho 1"): 3600,
    ("rates-deit-s-384", "images/s at rho 1"): 2800,
    ("train", "data wait"): -0.03,
}
"""By part and figure, for one H200; a negative goal is the most there may be."""


@dataclass(frozen=True)
class Part:
    """One step of the suite."""

    commands: Callable[[Path], list[list[str]]]
    """Modules and their arguments, given the folder for what they write; several run side by side."""
    limit_seconds: float
    """Longest it may take."""
    obstacle: Callable[[], str | None] = lambda: None
    """Why it cannot run here."""


class Suite:
    """The parts, as the arguments want them, and where their results are."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch = arguments, scratch
        self.dry: bool = arguments.dry_run
        self.device = "cpu" if self.dry else "cuda"
        self.models = {"tiny": TINY} if self.dry else MODELS
        self.output: Path = arguments.output

    def parts(self) -> dict[str, Part]:
        """By name, in the order of their importance, but that what is compiled first serves those after it."""
        parts = {"tests": Part(self._tests, 150, _obstacle_to_tests)}
        if len(self.models) > 1:  # side by side, to fill the compiler's cache
            parts["compile"] = Part(lambda _: [self._rates(name, None) for name in self.models], 280)
        for name in self.models:
            parts[f"rates-{name}"] = Part(lambda folder, name=name: [self._rates(name, folder)], 240)
        parts["train"] = Part(self._train, 180, self._obstacle_to_images)
        parts["attention"] = Part(self._attention, 90)
        for name in self.models:
            parts[f"step-{name}"] = Part(lambda folder, name=name: [self._step(name, folder)], 90)
        parts["loaders"] = Part(self._loaders, 150, self._obstacle_to_images)
        parts["augment"] = Part(self._augment, 60)
        first = next(iter(self.models))
        for name, setting in VARIANTS.items():
            parts[f"rates-{first}-{name}"] = Part(
                lambda folder, setting=setting: [self._rates(first, folder, setting)],
                240,
                lambda: "its figures are for a GPU to compare" if self.dry else None,
            )
        return parts

    # What the parts run.

    def _tests(self, _: Path) -> list[list[str]]:
        files = ["tests/pipelines/test_crng.py"] if self.dry else []
        return [["pytest", "-m", "gpu", "-q", "-rs", "--no-header", "-p", "no:cacheprovider", *files]]

    def _rates(self, name: str, folder: Path | None, *settings: str) -> list[str]:
        recipe, _, _, batch = self.models[name]
        words = ["tools.benchmarks.training", "--device", self.device, "--recipe", recipe, "--batch", str(batch)]
        words += self._set(*settings)
        if folder is None:
            return [*words, "--cycles", "0", "--cycle-steps", "9"]
        brief = ["--cycles", "1", "--cycle-steps", "3"] if self.dry else []
        return [*words, "--json", str(folder / "rates.json"), *brief]

    def _train(self, folder: Path) -> list[list[str]]:
        recipe, _, _, batch = next(iter(self.models.values()))
        words = ["tools.benchmarks.training", "--device", self.device, "--recipe", recipe, "--batch", str(batch)]
        words += ["--data", str(self.images), *self._set()]
        words += ["--seconds", "0.1" if self.dry else "60", "--cycle-steps", "2" if self.dry else "125"]
        return [[*words, "--json", str(folder / "train.json")]]

    def _set(self, *settings: str) -> list[str]:
        if self.dry:
            settings += (f"model.name={TINY[1]}", f"data.img_size={TINY[2]}")
            settings += ("model.patch_size=16", "model.embed_dim=16", "model.depth=1", "model.num_heads=1")
            settings += ("compile.mode=on", "compile.backend=aot_eager", "data.rand_augment=none", "schedule.low=0.8")
        return [word for setting in settings for word in ("--set", setting)]

    def _attention(self, folder: Path) -> list[list[str]]:
        words = ["tools.benchmarks.attention", "--device", self.device, "--json", str(folder / "attention.json")]
        if self.dry:
            return [[*words, "--lengths", "39", "--batch", "1", "--heads", "1", "--width", "16", "--rounds", "1"]]
        return [[*words, "--batch", "256", "--dtype", "bfloat16", "--rounds", "10"]]

    def _step(self, name: str, folder: Path) -> list[str]:
        _, model, img_size, batch = self.models[name]
        words = ["tools.benchmarks.step", "--device", self.device, "--model", model, "--img-size", str(img_size)]
        words += ["--json", str(folder / "step.json")]
        if self.dry:
            return [*words, "--batch", "1", "--rounds", "1", "--beside", "none", "naive"]
        return [*words, "--batch", str(batch // 8), "--rounds", "5", "--bf16", "--beside", "none", "naive"]

    def _loaders(self, folder: Path) -> list[list[str]]:
        words = ["tools.benchmarks.loader", "--data", str(self.images), "--json", str(folder / "loaders.json")]
        if self.dry:
            return [[*words, "--img-size", "32", "--batch", "24", "--batches", "5", "--rounds", "1", "--threads", "1"]]
        threads = str(len(os.sched_getaffinity(0)))
        return [
            [*words, "--device", "cuda", "--batch", "256", "--batches", "12", "--rounds", "3", "--threads", threads]
        ]

    def _augment(self, _: Path) -> list[list[str]]:
        words = ["tools.benchmarks.augment", "--device", self.device]
        if self.dry:
            return [[*words, "--batch", "2", "--rounds", "2", "--batches", "1"]]
        return [[*words, "--batch", "1024", "--rounds", "5", "--batches", "4"]]

    # Images.

    def _obstacle_to_images(self) -> str | None:
        if self.dry or self.arguments.images is not None:
            return None
        return "there are no images; name a tar of JPEG files in class folders with --images"

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

    # Running them.

    def run(self, name: str, part: Part) -> dict[str, Any]:
        """Run a part, keep its result, and return it."""
        began = time.monotonic()
        result: dict[str, Any] = {"part": name, "dry_run": self.dry, "status": "failed", "commit": self.commit}
        reason, told, tables = part.obstacle(), "", {}
        if reason is not None:
            result["status"] = "impossible"
        else:
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                try:
                    commands = part.commands(Path(folder))
                    reason, told = self._execute(commands, part.limit_seconds)
                except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
                    reason = f"{type(error).__name__}: {error}"
                tables = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
            if reason is None:
                result["status"] = "done"
        result |= {"reason": reason, "seconds": round(time.monotonic() - began, 1), "environment": self.environment}
        result |= {"told": told, "measured": tables}
        write(self.output / f"{name}.json", json.dumps(result, indent=1) + "\n")
        return result

    def _execute(self, commands: list[list[str]], limit: float) -> tuple[str | None, str]:
        """What went wrong, and what the commands printed."""
        running = []
        for command in commands:
            environ = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
            if self.dry:
                environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
                if command[0] == "tools.benchmarks.training":
                    environ["PSS_ATTENTION"] = "fused"
            words = [sys.executable, "-m", *command]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            running.append(subprocess.Popen(words, cwd=ROOT, env=environ, text=True, **pipes))
        deadline, reasons, told = time.monotonic() + limit, [], []
        for process in running:
            try:
                printed, complained = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                printed, complained = process.communicate()
                reasons.append(f"not done within {limit:.0f} s")
            else:
                if process.returncode:
                    lines = (complained.strip() or printed.strip() or "it said nothing").splitlines()
                    reasons.append(f"exit code {process.returncode}: {lines[-1]}")
            told.append(printed if process.returncode == 0 else (printed + complained)[-TAIL:])
        return ("; ".join(reasons) or None), "\n".join(told)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Where and with what."""
        return environment(torch.device(self.device)) | {"commit": self.commit}

    @cached_property
    def commit(self) -> str | None:
        """Of the code that runs."""
        found: str | None = self.arguments.commit or environment(torch.device("cpu"))["commit"]
        return found

    def kept(self) -> dict[str, dict[str, Any]]:
        """The results there are, by part."""
        found = {}
        for name in self.parts():
            path = self.output / f"{name}.json"
            if path.exists():
                found[name] = json.loads(path.read_text())
        return found

    def report(self) -> str:
        """All that was measured, goals first, as markdown."""
        kept = self.kept()
        title = "# A dry run on a CPU: its figures mean nothing" if self.dry else "# What a GPU reaches"
        lines = [title, "", ", ".join(f"{key} {value}" for key, value in self.environment.items()), ""]
        lines += ["| part | figure | goal | reached | met |", "|---|---|---|---|---|"]
        for (part, figure), goal in GOALS.items():
            lines.append(f"| {part} | {figure} | {_goal_cells(figure, goal, figures(kept.get(part)).get(figure))} |")
        lines += ["", "| part | status | seconds | commit |", "|---|---|---|---|"]
        for name in self.parts():
            result = kept.get(name, {"status": "not run yet", "reason": None})
            status = result["status"] + (f": {result['reason']}" if result["reason"] else "")
            status = status.replace("|", "/")
            lines.append(f"| {name} | {status} | {result.get('seconds', '–')} | {result.get('commit', '–')} |")
        for name, result in kept.items():
            if result["told"].strip():
                lines += ["", f"## {name}", "", *_fenced(result)]
        return "\n".join(lines) + "\n"


def figures(result: dict[str, Any] | None) -> dict[str, float]:
    """What a part's result says of the goals, by the name of the figure."""
    if result is None or result["status"] != "done":
        return {}
    found = {}
    measured = result["measured"].get("rates") or result["measured"].get("train")
    if measured is not None:
        if measured["savings"]:
            found["saving"] = statistics.median(measured["savings"])
        if "1" in measured["levels"]:
            seconds = statistics.median(measured["levels"]["1"]["seconds"])
            found["images/s at rho 1"] = int(measured["settings"]["batch"]) / seconds
        if measured["data_wait"] is not None:
            found["data wait"] = measured["data_wait"]
    return found


def _goal_cells(figure: str, goal: float, reached: float | None) -> str:
    def show(value: float) -> str:
        return f"{value:,.0f}" if figure.startswith("images") else f"{value:.1%}"

    bound = f"{'at most' if goal < 0 else 'at least'} {show(abs(goal))}"
    if reached is None:
        return f"{bound} | – | not measured"
    return f"{bound} | {show(reached)} | {'yes' if (reached <= -goal if goal < 0 else reached >= goal) else 'no'}"


def _fenced(result: dict[str, Any]) -> list[str]:
    """What a part printed: tables as they are, other text word for word."""
    text: str = result["told"].strip()
    return [text] if result["status"] == "done" and "|---|" in text else ["```", text, "```"]


def _obstacle_to_tests() -> str | None:
    return None if find_spec("pytest") and find_spec("hypothesis") else "pytest or hypothesis is not installed"


def _unpacked(archive: Path) -> Iterable[tuple[str, bytes]]:
    """`<class>/<name>` and content of every JPEG file."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and path.suffix.lower() in (".jpg", ".jpeg"):
                file = tar.extractfile(member)
                assert file is not None
                yield f"{path.parent.name}/{path.name}", file.read()


def _drawn() -> Iterable[tuple[str, bytes]]:
    """Twelve small pictures of two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for number, coarse in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(coarse).resize((48, 40)).save(file, "JPEG")
        yield f"{'ab'[number % 2]}/{number}.jpg", file.getvalue()


def write(path: Path, text: str) -> None:
    """Write a file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def run(arguments: argparse.Namespace) -> int:
    """Run what is wanted and not there yet; returns how many parts failed."""
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:
        suite = Suite(arguments, Path(scratch))
        parts, kept = suite.parts(), suite.kept()
        wanted = arguments.parts or list(parts)
        if unknown := [name for name in wanted if name not in parts]:
            raise SystemExit(f"there is no part {unknown[0]!r}; parts are {', '.join(parts)}")
        todo = [name for name in wanted if arguments.again or kept.get(name, {}).get("status") != "done"]
        if suite.dry and {"train", "loaders"} & set(todo):
            suite.images  # noqa: B018 (made before the parts that want them run side by side)
        reporting = threading.Lock()

        def attempt(name: str) -> bool:
            if time.monotonic() + parts[name].limit_seconds > deadline:
                print(f"{name}: put off, it may take {parts[name].limit_seconds:.0f} s; run again", flush=True)
                return True
            result = suite.run(name, parts[name])
            with reporting:
                write(suite.output / "report.md", suite.report())
            print(f"{name}: {result['status']} in {result['seconds']} s {result['reason'] or ''}", flush=True)
            return bool(result["status"] != "failed")

        with ThreadPoolExecutor(2 if suite.dry else 1) as pool:  # on a GPU, nothing beside what is timed
            succeeded = list(pool.map(attempt, todo))
        write(suite.output / "report.md", suite.report())
    print(f"report: {suite.output / 'report.md'}")
    return succeeded.count(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = os.environ.get("PSS_IMAGENET_SAMPLE")
    parser.add_argument("--images", type=Path, default=Path(sample) if sample else None, help="tar of JPEG files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/gpu", help="where results are kept")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--again", action="store_true", help="also parts whose results are there")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing that might not end by then")
    parser.add_argument("--commit", help="of the code, where the folder is no git checkout")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run tries the suite on the CPU")
    if arguments.dry_run and arguments.output == ROOT / "docs/results/gpu":
        parser.error("--dry-run measures nothing; name another --output")
    return 1 if run(arguments) else 0


if __name__ == "__main__":
    sys.exit(main())

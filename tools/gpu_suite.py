"""Everything that wants a GPU, in one command, in parts that are kept: tests, rates, a minute of training, benchmarks.

    python -m tools.gpu_suite --images imagenet-sample.tar --archive gpu.tar.gz

Parts come in the order of what they teach (`tools.gpu_parts`): whether the tests pass, what deit-s-224 reaches, a
minute of training with the loader, then all else. Two calls of six minutes answer the first three. Every part runs in a
process of its own and leaves `<output>/<part>.json`, whole or not at all; a call takes up those that are missing or
failed (`--again` all), and `--parts` chooses. A part that fails, or cannot run here, says why and stops nothing; a
batch that does not fit the GPU is halved, and the result says so. No part is begun that might not end within
`--minutes`; one that was too slow before gets all that is left of them. The report, `<output>/report.md`, sets what was
measured beside the goals. `--archive` holds the report and all results after every part, so that a call that is killed
leaves one too.

Where results must outlive the machine, unpack the archive of one call before the next: its folder is `gpu/`.

`--images` is a tar of JPEG files in class folders. `--dry-run` runs every part on the CPU with tiny shapes, Triton
kernels in their interpreter: its figures mean nothing, only that the suite works.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.measure import environment
from tools.gpu_parts import ROOT, Part, Parts, halved
from tools.gpu_report import report

TAIL = 2000  # characters kept of what a failed part said last
MOST_BYTES = 16 << 20  # of an archive
TOO_LONG = "not done within"


class Suite:
    """The parts, and where their results are."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch = arguments, scratch
        self.made = Parts(arguments, scratch)
        self.dry: bool = arguments.dry_run
        self.output: Path = arguments.output

    def parts(self) -> dict[str, Part]:
        """By name, the first ones first."""
        return self.made.all()

    def run(self, name: str, part: Part, limit_seconds: float) -> dict[str, Any]:
        """Run a part for at most so long, keep its result, and return it."""
        began = time.monotonic()
        result: dict[str, Any] = {"part": name, "dry_run": self.dry, "status": "failed", "commit": self.commit}
        reason, told, tables, notes = part.obstacle(), "", {}, list[str]()
        if reason is not None:
            result["status"] = "impossible"
        else:
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                try:
                    command: list[str] = part.command(Path(folder))
                    while True:
                        reason, told = self._execute(command, began + limit_seconds - time.monotonic())
                        smaller = halved(command) if reason is not None and "out of memory" in told.lower() else None
                        if smaller is None:
                            break
                        command, before, after = smaller
                        notes.append(f"a batch of {before} did not fit, {after} was taken")
                except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
                    reason = f"{type(error).__name__}: {error}"
                tables = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
            if reason is None:
                result["status"] = "done"
        if reason is not None and reason.startswith(TOO_LONG):
            reason = f"{TOO_LONG} {limit_seconds:.0f} s"
        result |= {"reason": reason, "seconds": round(time.monotonic() - began, 1), "environment": self.environment}
        result |= {"notes": notes, "told": told, "measured": tables}
        write(self.output / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
        return result

    def _execute(self, command: list[str], limit: float) -> tuple[str | None, str]:
        """What went wrong, and what the command printed."""
        environ = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        if self.dry:
            environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            if command[0] == "tools.benchmarks.training":
                environ["PSS_ATTENTION"] = "fused"
        words = [sys.executable, "-m", *command]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(words, cwd=ROOT, env=environ, text=True, **pipes)
        reason = None
        try:
            printed, complained = process.communicate(timeout=max(0.1, limit))
        except subprocess.TimeoutExpired:
            process.kill()
            printed, complained = process.communicate()
            reason = TOO_LONG
        else:
            if process.returncode:
                lines = (complained.strip() or printed.strip() or "it said nothing").splitlines()
                reason = f"exit code {process.returncode}: {lines[-1]}"
        return reason, printed if process.returncode == 0 else (printed + complained)[-TAIL:]

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Where and with what."""
        return environment(torch.device(self.made.device)) | {"commit": self.commit}

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

    def publish(self) -> None:
        """Write the report, and the archive where one is wanted."""
        title = "A dry run on a CPU: its figures mean nothing" if self.dry else "What a GPU reaches"
        kept = self.kept()
        text = report(title, self.environment, self.parts(), kept).encode()
        write(self.output / "report.md", text)
        if self.arguments.archive is not None:
            files = {"report.md": text}
            files |= {f"{name}.json": (self.output / f"{name}.json").read_bytes() for name in kept}
            write(self.arguments.archive, archived(files, MOST_BYTES))


def archived(files: Mapping[str, bytes], most_bytes: int) -> bytes:
    """The files as `gpu/*` in a compressed tar. What is too much is left out, the last ones first, and listed."""
    names, left_out = list(files), list[str]()
    while True:
        chosen = {name: files[name] for name in names}
        if left_out:
            chosen["left_out.txt"] = ("\n".join(left_out) + "\n").encode()
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for name, content in chosen.items():
                member = tarfile.TarInfo(f"gpu/{name}")
                member.size, member.mtime = len(content), int(time.time())
                tar.addfile(member, io.BytesIO(content))
        if packed.tell() <= most_bytes or not names:
            return packed.getvalue()
        left_out.append(names.pop())


def write(path: Path, content: bytes) -> None:
    """Write a file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
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
            suite.made.images  # noqa: B018 (made before the parts that want them run side by side)
        reporting = threading.Lock()

        def attempt(name: str) -> bool:
            limit, left = parts[name].limit_seconds, deadline - time.monotonic()
            if limit > left:
                print(f"{name}: put off, it may take {limit:.0f} s; run again", flush=True)
                return True
            slow = str(kept.get(name, {}).get("reason")).startswith(TOO_LONG)
            result = suite.run(name, parts[name], left if slow else limit)
            with reporting:
                suite.publish()
            said = "; ".join([*result["notes"], *([result["reason"]] if result["reason"] else [])])
            print(f"{name}: {result['status']} in {result['seconds']} s {said}".rstrip(), flush=True)
            return bool(result["status"] != "failed")

        with ThreadPoolExecutor(2 if suite.dry else 1) as pool:  # on a GPU, nothing beside what is timed
            succeeded = list(pool.map(attempt, todo))
        suite.publish()
    print(f"report: {suite.output / 'report.md'}")
    return succeeded.count(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = os.environ.get("PSS_IMAGENET_SAMPLE")
    parser.add_argument("--images", type=Path, default=Path(sample) if sample else None, help="tar of JPEG files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/gpu", help="where results are kept")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of at most 16 MiB with all results there are")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--again", action="store_true", help="also parts whose results are there")
    parser.add_argument("--minutes", type=float, help="begin nothing that might not end by then; 6 on a GPU")
    parser.add_argument("--commit", help="of the code, where the folder is no git checkout")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    if arguments.minutes is None:
        arguments.minutes = 60.0 if arguments.dry_run else 6.0
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run tries the suite on the CPU")
    if arguments.dry_run and arguments.output == ROOT / "docs/results/gpu":
        parser.error("--dry-run measures nothing; name another --output")
    return 1 if run(arguments) else 0


if __name__ == "__main__":
    sys.exit(main())

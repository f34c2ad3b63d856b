"""A newcomer's path, with the wheel installed and no checkout in sight: from photographs to a model used elsewhere.

It runs what docs/own-data.md prints, as it prints it, and nothing else.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import write_folder

PAGE = (Path(__file__).parent.parent / "docs" / "own-data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_from_photographs_to_a_model_that_others_load(installed, tmp_path):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    write_folder(tmp_path / "photos", {"cat": 40, "dog": 40}, seed=3)
    (recipe,) = blocks("yaml")
    (tmp_path / "photos.yaml").write_text(recipe, encoding="utf-8")

    where = installed.run("python", "-c", "import pss, cli; print(pss.__file__, cli.__file__)", cwd=tmp_path).stdout
    assert where.count(str(installed.folder / "venv")) == 2, "a checkout is in the way"

    said = {}
    for line in "".join(blocks("sh")).splitlines():
        done = installed.run(*shlex.split(line), cwd=tmp_path)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert "Traceback" not in done.stderr
        said[line] = done.stdout
    listed = next(text for line, text in said.items() if "--inspect" in line)
    assert "2: cat, dog" in listed
    assert not (tmp_path / "data" / "photos" / "train.beton").exists()
    table = next(text for line, text in said.items() if "--rho" in line)
    assert all(re.search(rf"(?m)^.*\b{rho}\b", table) for rho in ("0.8", "0.6", "0.4"))
    predicted = next(text for line, text in said.items() if "--predict" in line)
    assert predicted.count("000.jpg") == 1
    assert (tmp_path / "runs" / "photos" / "rho.png").exists()

    onnx, timm = blocks("python")
    done = installed.run("python", "-I", "-c", without_pss(onnx), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"1 (cat|dog)\n0\.6 (cat|dog)\n", done.stdout)
    done = installed.run("python", "-I", "-c", without_pss(timm), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 2])\n"


def without_pss(code):
    """Code that ends with an error if it imports any of ours."""
    return f"import sys\nsys.modules.update(dict.fromkeys(('pss', 'pipelines', 'cli')))\n{code}"

"""Packages that come with an extra: imported where they are used alone, and missed before any work, in one form."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import cli.eval
import pipelines
from cli.errors import run
from pipelines.base import DataConfig, DataError
from pipelines.conversion import convert as conversion
from pipelines.conversion.options import Options
from pipelines.extras import install_hint, need
from pipelines.sources.columns.tree import list_tree
from pipelines.sources.sample import Choice
from pipelines.sources.tables import claim_parquet
from pss.inference import export, report

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FILES = [path for package in ("pss", "pipelines", "cli") for path in sorted((ROOT / package).rglob("*.py"))]
IMPORTED_AS = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "nvidia-dali-cuda130": "nvidia",
    "mlflow-skinny": "mlflow",
}
"""Distributions whose modules are called otherwise."""
BROUGHT = {
    "scipy": "scikit-learn", "rich": "typer", "click": "typer",
    "pydantic_core": "pydantic", "annotated_types": "pydantic", "typing_extensions": "pydantic",
}  # fmt: skip
"""Modules that come with a package that is always there, and which one."""
WITHIN = {"cv2": "ffcv", "numba": "ffcv"}
"""Modules that come with an extra's package, which is called otherwise."""
ASKED = {"triton"}
"""What torch may bring along: everything that uses it asks first, and does without it."""
FIRST_LINES = {
    "pipelines/loaders/dali_loader.py": "dali", "pipelines/loaders/ffcv_loader.py": "ffcv",
    "pss/attention/kernels.py": "triton", "pipelines/augment/kernels.py": "triton",
    "pipelines/augment/mixing_kernels.py": "triton", "pss/attention/fused.py": "triton",
    "pss/attention/tables.py": "triton", "pipelines/augment/fused.py": "triton",
    "pipelines/loaders/dali_memory.py": "dali",
}  # fmt: skip
"""Files that import an extra's package as they are imported, which is done once it has been asked for."""


def modules_of(requirements):
    names = (re.match(r"[\w-]+", one)[0] for one in requirements if "[" not in one.partition(";")[0])
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


ALWAYS = modules_of(PROJECT["dependencies"]) | BROUGHT.keys()
OPTIONAL = {
    module: extra
    for extra, wanted in PROJECT["optional-dependencies"].items()
    if extra not in ("dev", "docs")
    for module in modules_of(wanted)
} | WITHIN  # fmt: skip


def imports(path):
    """(module, whether it is imported with the file, whether for the type checker alone) of all that is not ours."""
    tree = ast.parse(path.read_text("utf-8"))
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        inside, at = [], node
        while at in above:
            at = above[at]
            inside.append(at)
        typed = any(isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING" for one in inside)
        first = not any(isinstance(one, ast.FunctionDef) for one in inside)
        for name in names:
            module = name.partition(".")[0]
            if module not in sys.stdlib_module_names and module not in ("pss", "pipelines", "cli", "__future__"):
                yield module, first, typed


def test_every_import_is_declared():
    known = ALWAYS | OPTIONAL.keys() | ASKED
    found = {(path.relative_to(ROOT).as_posix(), module) for path in FILES for module, *_ in imports(path)}
    assert {one for one in found if one[1] not in known} == set()


def test_nothing_optional_is_imported_with_a_file():
    early = {
        path.relative_to(ROOT).as_posix(): OPTIONAL.get(module, module)
        for path in FILES
        for module, first, typed in imports(path)
        if first and not typed and (module in OPTIONAL or module in ASKED)
    }
    assert early.items() <= FIRST_LINES.items()


def asks(path):
    """The extras that a file asks for by `need` or `require`, or whose command it names."""
    for node in ast.walk(ast.parse("" if path.name == "extras.py" else path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in ("need", "require", "install_hint"):
            yield ast.literal_eval(node.args[0 if name == "install_hint" else 1])


def test_whoever_imports_something_optional_has_asked_for_it():
    """In the same file, or in the one that imports it. What reads images by their addresses does without numba."""
    elsewhere = {
        "pipelines/loaders/dali_loader.py": "pipelines/__init__.py",
        "pipelines/loaders/ffcv_loader.py": "pipelines/storage/ffcv_file.py",
        "pipelines/loaders/dali_memory.py": "pipelines/__init__.py",
        "pss/inference/quantised/making.py": "pss/inference/export.py",
        "pss/inference/quantised/sessions.py": "pss/inference/export.py",
    }
    lacking = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        asked = set(asks(path)) | set(asks(ROOT / elsewhere.get(name, name)))
        for module, _, typed in imports(path):
            if not typed and module in OPTIONAL and OPTIONAL[module] not in asked:
                lacking.append(f"{name} imports {module}")
    assert lacking == ["pipelines/storage/unlocked.py imports numba"]


def test_no_message_makes_up_its_own_command():
    written = [
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if path.name != "extras.py" and re.search(r"pip install|make setup", path.read_text("utf-8"))
    ]
    assert written == []


@pytest.fixture
def without(monkeypatch):
    def forget(*modules):
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)

    return forget


def asked_for(what, extra, *modules):
    return f"{what} needs {' and '.join(modules)}; run: {install_hint(extra)}"


@pytest.mark.parametrize(("backend", "module"), [("dali", "nvidia.dali"), ("ffcv", "ffcv")])
def test_a_loader_that_is_not_installed(image_root, without, backend, module):
    without(module)
    with pytest.raises(DataError) as error:
        pipelines.build(image_root, "train", config=DataConfig(img_size=32), batch_size=4, train=True, loader=backend)
    assert str(error.value) == asked_for(f"--loader {backend} (in Python, loader={backend!r})", backend, module)


@pytest.mark.parametrize(
    ("module", "extra", "options"),
    [("cv2", "ffcv", {"formats": ("ffcv",)}), ("ray", "ray", {"formats": ("dali",), "engine": "ray"})],
)
def test_a_conversion_notices_before_it_looks_at_the_source(tmp_path, without, module, extra, options):
    without(module)
    with pytest.raises(DataError) as error:
        conversion.convert(str(tmp_path / "nowhere"), tmp_path / "set", Options(**options), None)
    what = "--format ffcv" if extra == "ffcv" else "--engine ray"
    assert str(error.value) == asked_for(what, extra, module)
    assert list(tmp_path.iterdir()) == []


def test_tables_without_pyarrow(tmp_path, without):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    without("pyarrow", "pyarrow.parquet")
    with pytest.raises(DataError) as error:
        claim_parquet(list_tree(tmp_path), Choice())
    assert str(error.value) == asked_for("reading Parquet and Arrow files", "parquet", "pyarrow")


@pytest.mark.parametrize("modules", [("onnx",), ("onnxruntime",), ("onnx", "onnxscript", "onnxruntime")])
def test_an_export_notices_before_the_model_is_opened(tmp_path, without, capsys, modules):
    without(*modules)
    path = tmp_path / "model.onnx"
    with pytest.raises(SystemExit) as done:
        run(cli.eval.app, [str(tmp_path / "no-run"), "--export", str(path), "--dynamic"])
    assert done.value.code == 2
    assert capsys.readouterr().err == f"error: {asked_for(f'--export {path}', 'export', *modules)}\n"
    export.check_target(tmp_path / "model.pt2")


def test_a_report_without_plotly(without):
    assert report.missing() is None
    without("plotly")
    assert not report.available()
    assert report.missing() == asked_for("report.html", "report", "plotly")


def test_what_is_there_is_not_missed():
    need("this", "export", np.__name__)

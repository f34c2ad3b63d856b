"""What docs/deploy.md shows runs as printed, for every kind of file that it makes, on the pixels of evaluation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from conftest import picture
from PIL import Image

import cli.eval
import pss
from pipelines.augment.device import DeviceTransform
from pipelines.base import Batch, DataConfig
from pipelines.loaders.torch_loader import DecodedStep, Decoder
from pipelines.storage.source import FileSource
from pss import methods, recipes
from pss.inference import export
from pss.inference.opening import Run
from tools.real_data import unpack

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"\n## (\w+)\n.*?```python\n(.*?)```", PAGE, flags=re.DOTALL))
CROPS = (0.875, 0.95, 1.0)
INTERPOLATIONS = ("bicubic", "bilinear")


@pytest.fixture(scope="module")
def prepare():
    names = {}
    exec(CODE["Images"], names)
    return names["prepare"]


def settings_of(**changes):
    return DataConfig(**{"img_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **changes})


def told(data):
    return {key: getattr(data, key) for key in ("img_size", "crop_pct", "interpolation", "mean", "std")}


def shown(files, data):
    """What evaluation shows a model of each file, (3, S, S)."""
    source = FileSource(Path(), [str(file) for file in files], np.zeros(len(files), np.int64), ("",))
    decoder, transform = Decoder(source, data, train=False, seed=0), DeviceTransform(data, seed=0, train=False)
    for number in range(len(files)):
        pixels = torch.empty(1, 3, data.img_size, data.img_size, dtype=torch.uint8)
        step = DecodedStep(0, np.array([number], np.int64), pixels, crops_per_image=1)
        decoder.open(step)
        decoder.decode(step, range(1))
        yield transform(Batch(pixels, torch.zeros(1, dtype=torch.int64), torch.tensor([number])), 0)[0].numpy()
    source.close()


def check_alike(prepare, files, data):
    different = []
    for file, expected in zip(files, shown(files, data), strict=True):
        found = prepare(file, told(data))
        assert found.dtype == np.float32
        if not np.array_equal(found, expected):
            different.append(f"{file}: {abs(found - expected).max():.3g} at most")
    assert not different


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop", CROPS)
def test_an_image_of_any_size_is_prepared_as_in_evaluation(prepare, tmp_path, crop, interpolation):
    """Larger and smaller than the model's, hardly and much; sizes whose halves are odd; colours and grey."""
    sizes = [(501, 333), (333, 501), (57, 91), (256, 256), (224, 300), (225, 1000), (31, 2), (640, 481)]
    for number, (height, width) in enumerate(sizes):
        picture(height, width, number).save(tmp_path / f"{number}.jpg", quality=90)
    noise = np.random.default_rng(0).integers(0, 256, (263, 411, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(tmp_path / "noise.png")  # overshoots at both ends
    Image.fromarray(noise[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(noise).save(tmp_path / "transparent.png")
    picture(120, 97, 9).quantize(16).save(tmp_path / "palette.png")
    picture(120, 97, 9).convert("L").save(tmp_path / "grey.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(120, 97, 9).save(tmp_path / "turned.jpg", exif=turned)
    files = sorted(tmp_path.iterdir())
    check_alike(prepare, files, settings_of(crop_pct=crop, interpolation=interpolation))
    check_alike(prepare, files[:4], settings_of(crop_pct=crop, interpolation=interpolation, img_size=33))


@pytest.mark.exhaustive
@pytest.mark.parametrize("crop", CROPS)
def test_photographs_are_prepared_as_in_evaluation(prepare, tmp_path, crop):
    sample = os.environ.get("PSS_IMAGENET_SAMPLE")
    if not sample or not Path(sample).exists():
        pytest.skip("PSS_IMAGENET_SAMPLE names no tar of photographs")
    unpack(Path(sample), tmp_path / "photographs")
    files = sorted((tmp_path / "photographs").rglob("*.JPEG"))
    assert len(files) > 500
    check_alike(prepare, files, settings_of(crop_pct=crop))


METHOD_SETTINGS = {
    "sampled": ["method=sampled"],
    "dynamicvit": ["method=dynamicvit"],
    "avit": ["method=avit"],
    "s2vite": ["method=s2vite"],
}
"""With ρ; with operating points of its own; with none to choose; with a model that is deployed as a smaller one."""
QUICK = [("sampled", "free.onnx", None), ("sampled", "fixed.onnx", 0.6), ("sampled", "fixed.pt2", 0.6)]
EVERY = [
    *QUICK,
    ("sampled", "free.pt2", None),
    ("dynamicvit", "points.onnx", 0.7),
    ("dynamicvit", "points.pt2", 0.7),
    ("avit", "trained.onnx", None),
    ("avit", "trained.pt2", None),
    ("s2vite", "smaller.onnx", 0.6),
    ("s2vite", "smaller.pt2", 0.6),
]


def run_of(name):
    small = [
        "model.embed_dim=24",
        f"model.depth={4 if name == 'dynamicvit' else 1}",
        "data.crop_pct=0.875",
        "train.epochs=4",
        "optim.warmup_epochs=1",
    ]
    config = recipes.get("digits").with_settings([*small, *METHOD_SETTINGS[name]])
    torch.manual_seed(0)
    method = methods.build(config, num_classes=4, steps_per_epoch=5)
    torch.nn.init.normal_(method.model.head.weight, std=0.3)
    return Run("mine", config, ["nil", "one", "two", "many"], 7, method.deployed().eval())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kinds", [QUICK, pytest.param(EVERY, marks=pytest.mark.exhaustive)], ids=["quick", "every"])
def test_a_file_runs_where_there_is_no_pss(tmp_path, kinds):
    """One process for all of them, as importing torch takes longer than all the rest."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    runs = {name: run_of(name) for name, *_ in kinds}
    expected = {}
    for name, file, point in kinds:
        run, free = runs[name], file.startswith("free")
        folder = tmp_path / file
        folder.mkdir()
        export.export(run, folder / f"model.{file.rpartition('.')[2]}", point=point, dynamic=free)
        picture(50, 71, 1).save(folder / "photo.jpg")
        points = export.LEVELS if free else (point,)
        found = [pss.predict(run, folder / "photo.jpg", rho=one, top=1)[0].classes[0][0] for one in points]
        labels = ["as trained" if one is None else f"{one:g}" for one in points]
        expected[file] = [" ".join(pair) for pair in zip(labels, found, strict=True)]
    (tmp_path / "prepare.py").write_text(CODE["Images"], encoding="utf-8")
    for suffix, heading in (("onnx", "ONNX"), ("pt2", "torch")):
        (tmp_path / f"{suffix}.py").write_text(CODE[heading], encoding="utf-8")
    (tmp_path / "all.py").write_text(
        "import os, runpy, sys\n"
        "for name in ('pss', 'pipelines', 'cli'):\n"
        "    sys.modules[name] = None\n"
        "for file in sys.argv[1:]:\n"
        "    os.chdir(os.path.join(sys.path[0], file))\n"
        "    print(f'# {file}')\n"
        "    runpy.run_path(os.path.join('..', file.rpartition('.')[2] + '.py'))\n",
        encoding="utf-8",
    )
    words = [sys.executable, tmp_path / "all.py", *expected]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    sections = re.split(r"^# (.*)\n", done.stdout, flags=re.MULTILINE)[1:]
    assert {name: lines.splitlines() for name, lines in zip(sections[::2], sections[1::2], strict=True)} == expected


def test_the_commands_of_the_page_are_understood():
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines():
        words = line.partition("#")[0].split()
        context = typer.main.get_command(cli.eval.app).make_context("eval", words[1:])
        assert context.params["export"] in (Path("model.onnx"), Path("model.pt2"))

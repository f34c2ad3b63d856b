"""The picture of a plan: ρ and the learning rate as the run will have them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from memory_loader import fit
from PIL import Image

from cli import plan as shown
from cli.train import train
from pss import methods, recipes
from pss.inference.plots import plot_plan
from pss.planning.plan import learning_rates, plan
from pss.runs.log import read_rows
from pss.training.optim import build_optimizer, rates_at, set_rates
from pss.training.setup import positions_of

SMALL = ["model.embed_dim=24", "model.depth=2", "train.epochs=4", "train.batch_size=8", "train.log_every_steps=1"]
DIFFERENT = {
    "sampled": ["optim.layer_decay=0.5", "optim.warmup_epochs=1"],
    "dense": ["optim.warmup_epochs=1", "optim.warmup_prefix=true", "optim.cooldown_epochs=1"],
    "dynamicvit": ["optim.warmup_epochs=1"],
    "sparsifiner": ["optim.warmup_epochs=0"],
    "svite": ["optim.warmup_epochs=0"],
    "toe": ["optim.warmup_epochs=1"],
    "avit": ["optim.warmup_epochs=0"],
}


@pytest.mark.parametrize("method", DIFFERENT)
def test_rates_are_those_of_the_optimizer(method):
    config = recipes.get("digits").with_settings([f"method={method}", *SMALL, *DIFFERENT[method]])
    with torch.device("meta"):
        planned = methods.build(config, 4, 5)
    built = methods.build(config, 4, 5)
    expected, first, before = [], 0, None
    for at in positions_of(built, range(20)):
        if at.phase != before:
            first, before, phase = at.step, at.phase, built.phases()[at.phase]
            built.begin_phase(phase)
            optimizer, schedule = build_optimizer(built, phase, batch_size=8, steps_per_epoch=5)
        set_rates(optimizer, schedule, at.step - first, built.lr_factors(at))
        rates = [group["lr"] for group in optimizer.param_groups]
        expected.append((min(rates), max(rates)))
    assert rates_at(planned, list(positions_of(planned, range(20))), batch_size=8) == expected
    assert len(set(expected)) > 10


def test_a_plan_says_what_the_log_will_say(tmp_path):
    config = recipes.get("digits").with_settings([*SMALL, "optim.warmup_epochs=1"])
    planned = plan(config, num_images=40, num_classes=4)
    fit(config, tmp_path)
    logged = {row["step"] - 1: row for row in read_rows(tmp_path, "step")}
    rates = {rate.step: rate.high for rate in learning_rates(config, planned)}
    assert rates == {step: row["lr"] for step, row in logged.items()}
    assert list(planned.rhos) == [row["rho"] for row in logged.values()]


def columns(picture):
    """Of a PNG: for each column the colours in it, as a set."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    return pixels, [set(map(tuple, column)) for column in pixels.transpose(1, 0, 2)]


@pytest.mark.parametrize("kind", ["few changes", "cycles by the epoch", "a new share each step"])
def test_the_picture_follows_the_course(kind):
    """Another course is another picture, and one that changes too often for single steps is drawn as range and mean."""
    per = 100
    rhos = {
        "few changes": [0.2] * 2000 + [1.0] * 2000,
        "cycles by the epoch": [0.2, 0.4, 0.6, 0.8, 1.0] * 800,
        "a new share each step": [float(x) for x in np.random.default_rng(0).choice([0.2, 0.6, 1.0], 4000)],
    }[kind]
    rates = [(step, 1e-3, 1e-3) for step in range(0, 4000, 10)]
    drawn = plot_plan(rhos, rates, steps_per_epoch=per, title="$a_b$: 40 epochs")
    dense = plot_plan([1.0] * 4000, rates, steps_per_epoch=per, title="$a_b$: 40 epochs")
    pixels, other = columns(drawn)[0], columns(dense)[0]
    assert pixels.shape == other.shape
    assert (pixels != other).any()
    band = (np.abs(pixels.astype(int) - (204, 227, 240)).sum(-1) < 12).mean()  # the light blue of a range
    assert (band > 0.05) == (kind != "few changes")


def test_the_command_draws(tmp_path, capsys):
    settings = [*SMALL, "optim.warmup_epochs=1"]
    train("digits", plan=True, picture=tmp_path / "new" / "plan.png", settings=settings)
    with Image.open(tmp_path / "new" / "plan.png") as drawn:
        assert drawn.size == (1650, 750)
    told = capsys.readouterr()
    assert f"wrote {tmp_path}/new/plan.png" in told.err
    lines = told.out.splitlines()
    (number,) = (n for n, line in enumerate(lines) if line.startswith("learning rate over the run: "))
    assert "(epoch 1)" in lines[number]
    marks = lines[number + 1].strip()
    assert len(marks) == 72
    assert marks.index("█") > 10
    assert marks[0] in "▁▂"
    assert marks[-1] == "▁"
    assert all(len(line) <= 100 for line in lines)


def test_the_line_of_rates_fits_a_run_of_few_steps(capsys):
    config = recipes.get("digits").with_settings([*SMALL, "train.max_steps=3"])
    shown.show_rates(config, plan(config, num_images=40))
    assert len(capsys.readouterr().out.splitlines()[-1].strip()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": True, "picture": "plan.jpg"}, r"--picture .*plan\.jpg is drawn as a PNG"),
        ({"picture": "plan.png"}, "--picture draws what --plan shows; add --plan"),
        ({"plan": True, "picture": "file/plan.png"}, "--picture .* cannot be written: .*; name another file"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_counted(tmp_path, options, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        train("digits", **options | {"picture": tmp_path / options["picture"]})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

"""The sheet of a run's first images shows what the model gets and keeps, and leaves the run as it was."""

from __future__ import annotations

import io
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from memory_loader import MemoryLoader
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import CLASSES, HERE, SETTINGS, assert_same, final_state, trainer

from pipelines.base import DataConfig
from pss import methods, recipes
from pss.methods import METHODS
from pss.runs.log import AUGMENTED
from pss.training import sheet
from pss.training.trainer import Trainer


def build(method, *settings):
    options = ["optim.warmup_epochs=0", "train.epochs=4", "model.embed_dim=24", "model.depth=4", f"method={method}"]
    return methods.build(recipes.get("digits").with_settings([*options, *settings]), 4, 5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_shown_and_left_as_it_was(method):
    """Weights, buffers, modes and random numbers; and its next step is trained as it would have been."""
    one = build(method)
    one.train()
    one.model.patch_embed.eval()  # a part that a method holds in evaluation mode
    images = torch.randn(3, 3, 32, 32)
    state = {name: value.clone() for name, value in one.state_dict().items()}
    modes, random = [part.training for part in one.modules()], torch.get_rng_state()
    points = sheet.levels(one, 20)
    rows = sheet.seen(one, images, points, nullcontext())
    assert [point for point, _ in rows] == points
    assert all(shares.shape == (3, *one.model.grid_size) for _, shares in rows)
    assert_same(state, dict(one.state_dict()))
    assert modes == [part.training for part in one.modules()]
    assert torch.equal(random, torch.get_rng_state())
    picture = sheet.draw(images, rows, DataConfig(), one.knob)
    with Image.open(io.BytesIO(picture)) as drawn:
        dropping = sum(bool((shares < 1).any()) for _, shares in rows)
        assert drawn.height == (1 + dropping) * (128 + 6) + 6


@pytest.mark.parametrize("sort", ["magnitude", "random"])
@pytest.mark.parametrize("side", [32, 16])
def test_as_many_patches_are_kept_as_the_steps_keep(sort, side):
    """Also of smaller images, whose few patches lie apart on the model's grid."""
    five = ["schedule.name=list", "schedule.rhos=0.2,0.4,0.6,0.8,1"]
    one = build("sampled", f"model.sort={sort}", "model.patch_size=4", *five)
    points = sheet.levels(one, 20)
    assert points == [1.0, 0.8, 0.6, 0.4, 0.2]
    rows = dict(sheet.seen(one, torch.randn(3, 3, side, side), points, nullcontext()))
    for point, shares in rows.items():
        kept = one.model.num_kept_tokens(point, side) - one.model.num_prefix_tokens
        assert shares.flatten(1).sum(1).tolist() == [kept] * 3
    for more, less in itertools.pairwise(points):
        assert bool((rows[less] <= rows[more]).all())


def test_pixels_are_those_of_the_images_and_what_is_dropped_is_grey():
    data = DataConfig(img_size=32)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    shares = torch.ones(2, 4, 4)
    shares[0, 0, 1] = 0
    with Image.open(io.BytesIO(sheet.draw((pixels / 255 - mean) / std, [(0.5, shares)], data))) as drawn:
        shown = np.asarray(drawn)
    left, cell = shown.shape[1] - 2 * (128 + 6), 128 + 6
    for number in range(2):
        whole = shown[6 : 6 + 128 : 4, left + number * cell :][:, :128:4]
        assert np.array_equal(whole, pixels[number].permute(1, 2, 0).numpy())
        below = shown[6 + cell : 6 + cell + 128 : 4, left + number * cell :][:, :128:4]
        dropped = np.zeros((32, 32), bool)
        dropped[0:8, 8:16] = number == 0
        assert np.array_equal(below[~dropped], whole[~dropped])
        assert (below[dropped] == (127, 141, 163)).all()


def test_a_run_is_the_same_to_the_bit_with_and_without_it(tmp_path, monkeypatch):
    trainer(tmp_path / "with", "train.epochs=2").fit()
    monkeypatch.setattr("pss.training.reporting.Reporter.picture", lambda *of: None)
    trainer(tmp_path / "without", "train.epochs=2").fit()
    assert (tmp_path / "with" / AUGMENTED).is_file()
    assert not (tmp_path / "without" / AUGMENTED).exists()
    assert_same(final_state(tmp_path / "with"), final_state(tmp_path / "without"))


def images_on_the_board(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.encoded_image_string for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_it_is_in_tensorboard_once_also_after_a_resume(tmp_path):
    trainer(tmp_path, "train.max_steps=7").fit()
    content = (tmp_path / AUGMENTED).read_bytes()
    assert images_on_the_board(tmp_path) == {"augmented": [content]}
    trainer(tmp_path, "train.max_steps=12").fit()
    assert (tmp_path / AUGMENTED).read_bytes() == content
    assert images_on_the_board(tmp_path) == {"augmented": [content]}


def test_it_shows_the_first_batch_as_it_was_mixed_and_flipped(tmp_path, monkeypatch):
    shown, original = [], sheet.draw
    monkeypatch.setattr(sheet, "draw", lambda images, *of: shown.append(images.clone()) or original(images, *of))
    config = recipes.get("digits").with_settings(SETTINGS)
    run = Trainer(config, MemoryLoader(), MemoryLoader(train=False), classes=CLASSES, output=tmp_path, world=HERE)
    forward, taken = run.method.forward, []
    run.method.forward = lambda images, *of: taken.append(images.clone()) or forward(images, *of)
    run.fit()
    assert len(shown) == 1
    assert torch.equal(shown[0], taken[0][: sheet.IMAGES])


def test_many_levels_are_thinned_out_and_both_ends_stay():
    rhos = ",".join(f"{number / 20:g}" for number in range(4, 21))
    points = sheet.levels(build("sampled", "schedule.name=list", f"schedule.rhos={rhos}"), 20)
    assert (len(points), points[0], points[-1]) == (6, 1.0, 0.2)

"""Teachers asked place by place: what they say of a place is what their head makes of its features alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from pss import methods, recipes
from pss.inference import labelling
from pss.inference.labelling import DenseTeacher, open_teacher
from pss.inference.opening import Run
from pss.models.create import create_model
from pss.models.settings import TrainedOn

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SMALL: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8, "num_classes": 5}


def teacher(model: nn.Module, side: int) -> DenseTeacher:
    return DenseTeacher("it", model, side=side, mean=MEAN, std=STD, device=CPU)


def shaken(model: nn.Module) -> nn.Module:
    """Every parameter has left its initial value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pictures(count: int, side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def normalised(images: NDArray[np.uint8]) -> torch.Tensor:
    values = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def by_class(values: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.take_along_axis(values, np.argsort(classes, 1), 1)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv4_conv_small_050", "regnetx_002"])
def test_the_mean_over_places_is_what_a_linear_head_says_of_the_image(name: str) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        images = pictures(2, 96)
        expected = model(normalised(images))
    values, classes, best = teacher(model, 96)(images, (3, 3), 5)
    assert values.shape == classes.shape == (2, 5, 3, 3)
    assert (values[:, 1:] <= values[:, :-1]).all()
    if name != "mobilenetv4_conv_small_050":  # its head is not linear
        torch.testing.assert_close(
            torch.from_numpy(by_class(values, classes).mean((2, 3))), expected, atol=1e-4, rtol=0
        )
    assert best.tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("deit_tiny_patch16_224", "token"),
        ("deit_tiny_patch16_224", "avg"),
        ("deit_tiny_distilled_patch16_224", "token"),
    ],
)
def test_a_vits_places_are_its_patches(name: str, pool: str) -> None:
    ours = shaken(create_model(name, global_pool=pool, **SMALL))
    plain = shaken(timm.create_model(name, global_pool=pool, **SMALL))
    plain.load_state_dict({key: value for key, value in ours.state_dict().items() if key != "_extra_state"})
    images = pictures(3, 32)
    with torch.no_grad():
        tokens = plain.forward_features(normalised(images))
        heads = [plain.head] + ([plain.head_dist] if "distilled" in name else [])
        patches = plain.fc_norm(tokens[:, plain.num_prefix_tokens :])
        expected = sum(head(patches) for head in heads) / len(heads)
    for model in (ours, plain):
        values, classes, best = teacher(model, 32)(images, (4, 4), 5)
        found = torch.from_numpy(by_class(values, classes)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        with torch.no_grad():
            assert best.tolist() == plain(normalised(images)).argmax(1).tolist()


def test_a_backbones_own_classifier_of_patches_is_asked() -> None:
    model = create_model("deit_tiny_patch16_224", **SMALL)
    aux = nn.Linear(24, 5)
    model.answers = lambda tokens: (model.readout(tokens), aux(tokens[:, 1:]))  # type: ignore[method-assign]
    images = pictures(2, 32)
    values, classes, _ = teacher(model, 32)(images, (4, 4), 5)
    with torch.no_grad():
        expected = aux(model.trunk(*model.see(normalised(images), 1.0))[:, 1:])
    found = torch.from_numpy(by_class(values, classes)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "deit_tiny_patch16_224"])
def test_places_are_where_they_are_in_the_image(name: str) -> None:
    """Something in the upper right changes most what is said of the upper right."""
    small: dict[str, Any] = {}
    side = 128
    if "deit" in name:
        small, side = SMALL | {"img_size": 128, "patch_size": 16, "num_classes": 5}, 128
    if "swin" in name:
        small, side = {"img_size": 128, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}, 128
    model = timm.create_model(name, **({"num_classes": 5} | small)).eval()
    asked = teacher(model, side)
    rows, columns = asked.grid(None)
    blank = np.full((1, side, side, 3), 120, np.uint8)
    marked = blank.copy()
    marked[:, : side // 4, -side // 4 :] = pictures(1, side)[:, : side // 4, -side // 4 :]
    before, after = (by_class(*asked(images, (rows, columns), 5)[:2]) for images in (blank, marked))
    changed = np.abs(after - before).sum((0, 1))
    quarters = {
        (i, j): changed[i * rows // 2 : (i + 1) * rows // 2, j * columns // 2 : (j + 1) * columns // 2].mean()
        for i in (0, 1)
        for j in (0, 1)
    }
    assert max(quarters, key=lambda where: quarters[where]) == (0, 1)


def test_fewer_places_are_means_of_the_teachers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = teacher(timm.create_model("deit_tiny_patch16_224", **SMALL), 32)
    assert (asked.grid(None), asked.grid(18), asked.grid(3)) == ((4, 4), (4, 4), (3, 3))
    slope = torch.arange(24.0).view(1, 24, 1, 1) + 100 * torch.arange(24.0).view(1, 1, 24, 1)
    monkeypatch.setattr(asked, "_logits", lambda images: (slope, torch.zeros(1, 1)))
    asked._own_grid = (24, 24)
    values, _, _ = asked(pictures(1, 32), (18, 18), 1)
    places = (np.arange(18) + 0.5) * 24 / 18 - 0.5
    expected = places[:, None] + 100 * places
    assert np.abs(values[0, 0] - expected)[1:-1, 1:-1].max() < 0.2 * 101  # a fifth of a place


def test_timm_models_are_opened_with_their_weights_from_a_file(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=7)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "a.pt")
    asked = open_teacher(f"resnet10t={tmp_path}/a.pt", CPU)
    assert (asked.num_classes, asked.side, asked.grid(18), asked.classes) == (7, 224, (7, 7), None)
    assert asked.digest == DenseTeacher("other", model, side=64, mean=MEAN, std=STD, device=CPU).digest
    with torch.no_grad():
        model.fc.bias[0] += 1
    assert asked.digest != DenseTeacher("other", model, side=64, mean=MEAN, std=STD, device=CPU).digest
    ours = create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5)
    ours.trained_on = TrainedOn(("a", "b", "c", "d", "e"), MEAN, STD)
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    asked = open_teacher(f"deit_tiny_patch16_224={tmp_path}/ours.pt", CPU)
    assert (asked.num_classes, asked.side, asked.grid(18)) == (5, 32, (4, 4))
    assert asked.classes == ("a", "b", "c", "d", "e")
    assert torch.allclose(asked._shift.flatten(), torch.tensor(MEAN) / torch.tensor(STD))


def test_what_is_no_teacher_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for source, match in (
        (f"resnet10t={tmp_path}/none.pt", r"there is no weights file .*none.pt; name one"),
        (f"resnet10t={tmp_path}/junk.pt", "cannot be read as plain weights"),
        (f"resnet10t={tmp_path}/x.pt", r"has no classifier fc.weight; name a file of a whole resnet10t"),
        (f"resnet18={tmp_path}/a.pt", r"is not of a resnet18 \(.*\); name the model that it belongs to"),
        (f"{tmp_path}/nothing", "not found; name the --output folder"),
        (f"nonet={tmp_path}/a.pt", "nonet"),
    ):
        with pytest.raises(ValueError, match=match):
            open_teacher(source, CPU)
    with pytest.raises(ValueError, match=r"the classifier of it cannot be asked place by place \(its features are no"):
        teacher(timm.create_model("crossvit_tiny_240", num_classes=3), 240)


def test_a_published_model_knows_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By WordNet's ids, as converted ImageNet calls them. What cannot be had is told."""
    create = timm.create_model
    monkeypatch.setattr(labelling.timm, "create_model", lambda name, pretrained: create(name))
    asked = open_teacher("timm:resnet10t", CPU)
    assert asked.classes is not None
    assert (len(asked.classes), asked.classes[0], asked.classes[-1]) == (1000, "n01440764", "n15075141")

    def fail(name: str, pretrained: bool) -> nn.Module:
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(labelling.timm, "create_model", fail)
    with pytest.raises(ValueError, match=r"no pretrained weights for resnet10t \(no network\); name a weights file as"):
        open_teacher("timm:resnet10t", CPU)


def test_a_run_is_asked_if_it_predicts_as_its_backbone_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fits in (("dense", True), ("sampled", True), ("dynamicvit", False)):
        config = recipes.get("digits").with_settings([f"method={name}", "model.embed_dim=24"])
        run = Run("it", config, ["a", "b", "c"], 1, methods.build(config, 3, 1).eval())
        monkeypatch.setattr(labelling, "open_run", lambda source, device, run=run: run)
        if fits:
            asked = open_teacher("runs/it", CPU)
            assert (asked.classes, asked.side, asked.grid(18)) == (("a", "b", "c"), 32, (4, 4))
        else:
            with pytest.raises(ValueError, match="predicts in the way of method dynamicvit, which is not asked"):
                open_teacher("runs/it", CPU)

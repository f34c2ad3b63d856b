"""Configurations: every recipe is valid, settings change what they name, mistakes are answered in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm

from pss import methods, recipes
from pss.config import Config, ScheduleConfig, changes_of_run, differing_fields
from pss.planning.plan import IMAGENET_IMAGES
from pss.training.optim import peak_lr


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_valid_and_survives_its_json(name, tmp_path):
    config = recipes.get(name)
    assert config.recipe == name
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert Config.from_json(path) == config
    assert recipes.RECIPES[name].__doc__


@pytest.mark.parametrize(
    ("name", "batch_size", "steps_per_epoch", "peak"),
    [("deit-s-224", 1024, 1251, 1e-3), ("deit-s-384", 512, 2502, 5e-4), ("vit-b-simmim", 512, 2502, 1.25e-3)],
)
def test_published_runs_have_their_batch_and_peak_rate(name, batch_size, steps_per_epoch, peak):
    config = recipes.get(name)
    assert config.train.batch_size == batch_size
    assert IMAGENET_IMAGES // batch_size == steps_per_epoch
    assert peak_lr(config.optim, config.train.batch_size) == pytest.approx(peak)


def test_plain_deit_is_timms_model_trained_on_all_patches():
    plain, small = recipes.get("deit-s-224-plain"), recipes.get("deit-s-224")
    method = methods.build(plain, 1000, steps_per_epoch=1)
    theirs = timm.create_model("deit_small_patch16_224")
    assert type(method) is methods.METHODS["dense"]
    assert {name: part.shape for name, part in method.model.named_parameters()} == {
        name: part.shape for name, part in theirs.named_parameters()
    }
    assert (method.model.global_pool, method.model.num_prefix_tokens) == ("token", 1)
    assert {field.split(" ")[0] for field in differing_fields(plain, small)} == {
        "recipe",
        "method",
        "model.rel_pos",
        "model.qkv_bias",
        "model.init",
        "model.global_pool",
    } | {f"schedule.{name}" for name, value in vars(small.section_of(ScheduleConfig)).items() if value is not None}
    # The schedule is not gone: it comes back with the method that reads it.
    assert plain.with_settings(["method=sampled"]).section_of(ScheduleConfig) == small.section_of(ScheduleConfig)


def test_settings_reach_their_fields():
    before = recipes.get("digits")
    after = before.with_settings(
        ["train.epochs=7", "data.crop_scale=0.5,1", "schedule.period_steps=12", "optim.clip_grad=none"]
    )
    assert after.train.epochs == 7
    assert after.data.crop_scale == (0.5, 1.0)
    assert after.section_of(ScheduleConfig).period_steps == 12
    assert {field.split(" ")[0] for field in differing_fields(before, after)} == {
        "train.epochs", "data.crop_scale", "schedule.period_steps"
    }  # fmt: skip


def test_a_choice_named_none_is_not_the_absence_of_one():
    config = recipes.get("deit-s-224")
    assert config.with_settings(["model.rel_pos=none"]).model.rel_pos == "none"
    assert config.with_settings(["model.rel_pos=null"]).model.rel_pos is None
    assert config.with_settings(["model.qkv_bias=none"]).model.qkv_bias is None


def test_settings_are_checked_together_not_one_by_one():
    # Warm-up is longer than the run only between the two settings.
    config = recipes.get("deit-s-224").with_settings(
        ["train.epochs=2", "optim.warmup_epochs=1", "schedule.cooldown_epochs=0"]
    )
    assert config.train.epochs == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", "did you mean train.epochs"),
        ("trian.epochs=3", "did you mean train.epochs"),
        ("epochs=3", "did you mean train.epochs"),
        ("train.epochs=three", "--set train.epochs=three: train.epochs is 'three'; it must be a whole number"),
        ("optim.lr=fast", "must be a number"),
        ("data.mean=1,2", "must be 3 numbers with commas"),
        ("schedule.name=cyc", "one of fixed, linear, cosine, cyclic"),
        ("schedule.low=0", "schedule.low is '0'; it must be above 0"),
        ("schedule.rho=1.5", "must be at most 1"),
        ("schedule.high=0.1", "one of 0.2, 0.4, 0.6, 0.8, 1.0"),
        ("train.epochs=0", "must be at least 1"),
        ("train.epochs=1", "optim.warmup_epochs"),
        ("train.ema_decay=1", "ema_decay"),
        ("data.crop_scale=0,1", "crop_scale"),
        ("compile.max_graphs=0", "must be at least 1"),
        ("compile.mode=yes", "one of auto, on, off"),
        ("recipe=other", "there is no key"),
        ("train.epochs", "write section.key=value"),
        ("optim.lr=nan", "optim.lr is 'nan'; it must be a finite number"),
        ("method=sparse", "use one of .*dense, .*sampled"),
    ],
)
def test_mistakes_are_named_with_their_remedy(setting, message):
    with pytest.raises(ValueError, match=message):
        recipes.get("digits").with_settings([setting])


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean deit-s-224\?"):
        recipes.get("deit_s_22")


def test_a_foreign_config_file_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for text in ("{", '{"recipe": "digits", "extra": 1}', "[]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no run configuration"):
            Config.from_json(path)
    with pytest.raises(ValueError, match="not found"):
        Config.from_json(tmp_path / "none.json")


def test_images_must_reach_their_full_size_within_the_run():
    grow = ["data.progressive.start_size=160", "data.progressive.end_epoch=10"]
    with pytest.raises(ValueError, match=r"end_epoch is 10 and train.epochs 10; .*--set data.progressive.end_epoch=8"):
        recipes.get("deit-s-224").with_settings([*grow, "train.epochs=10"])
    recipes.get("deit-s-224").with_settings([*grow, "train.epochs=11"])


def test_a_file_of_a_run_from_before_the_queue_was_a_data_setting_is_read():
    raw = Config.from_dict(recipes.get("digits").to_dict()).to_dict()
    del raw["data"]["prefetch_gb"]
    raw["train"]["prefetch_mb"] = 1024.0
    former = Config.from_dict(raw)
    assert former.data.prefetch_bytes("cuda") == 2**30
    assert former.data == replace(recipes.get("digits").data, prefetch_gb=2**30 / 1e9)
    assert changes_of_run(former, recipes.get("digits")) == []
    assert "prefetch_mb" in raw["train"]  # what was read is left as it was
    with pytest.raises(ValueError, match=r"no key 'train\.prefetch_mb'; it is data\.prefetch_gb now, in GB"):
        recipes.get("digits").with_settings(["train.prefetch_mb=512"])

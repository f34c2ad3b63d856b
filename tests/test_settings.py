"""Every field of every section: what it takes, who reads it, and that what it takes trains.

Fields are found by walking the dataclasses; `fields.py` draws their values from what they declare.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Literal, get_origin

import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt
from fields import FIELDS, elements_of, inside, outside, shape_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from memory_loader import MemoryLoader

import cli.train
from cli.errors import run
from pipelines.settings import ALWAYS, OneOf, Parsed, SettingError
from pss import recipes
from pss.config import Config, LossConfig, ModelConfig, OptimConfig, ScheduleConfig
from pss.inference.opening import load_run
from pss.runtime.processes import World
from pss.starting import check_machine, check_shapes, check_steps
from pss.training.trainer import Trainer

EXHAUSTIVE = pytest.mark.exhaustive
HERE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_declares_who_reads_it_and_what_it_takes(field):
    assert field.read_ifs, f"{field.name} does not say when it is read: Always[...], or a ReadIf beside its range"
    assert all(one.reader for one in field.read_ifs if one is not ALWAYS)
    shape = shape_of(field.hint)
    for part in elements_of(shape) or [shape]:
        if part.kind in (int, float):
            assert part.find(OneOf) or (part.limit(Ge, Gt) is not None and part.limit(Le, Lt) is not None), field.name
        elif part.kind is str:
            assert part.find(Parsed), f"{field.name} takes any text"
        else:
            assert part.kind is bool or get_origin(part.kind) is Literal, field.name


@pytest.mark.parametrize("examples", [4, pytest.param(200, marks=EXHAUSTIVE)])
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_what_a_field_does_not_take_is_one_sentence_that_names_it(field, examples, capsys):
    @settings(max_examples=examples, database=None, derandomize=examples < 10)
    @given(outside(field.hint))
    def refuses(text):
        with pytest.raises(SystemExit) as left:
            run(cli.train.app, ["digits", "--plan", "--set", f"{field.name}={text}"])
        told = capsys.readouterr()
        assert (left.value.code, told.out) == (2, ""), text
        assert re.fullmatch(rf"error: .*{re.escape(field.name)}.*\n", told.err), (text, told.err)

    refuses()


# What nothing reads.

GIVEN = [
    (["schedule.rho=0.4"], "schedule.rho", "schedule.name=fixed"),
    (["schedule.name=linear", "schedule.period_steps=30"], "schedule.period_steps", "schedule.name=cyclic"),
    (["schedule.name=fixed", "schedule.low=0.4"], "schedule.low", "schedule.name=linear, cosine or cyclic"),
    (["schedule.name=list", "schedule.rhos=1,0.5", "schedule.high=0.8"], "schedule.high", "schedule.name=linear"),
    (["schedule.rhos=1,0.5"], "schedule.rhos", "schedule.name=list"),
    (["schedule.form=cut"], "schedule.form", "schedule.name=linear or cosine"),
    (["schedule.name=fixed", "schedule.shuffle=true"], "schedule.shuffle", "schedule.name=linear"),
    (["method=dense", "schedule.cooldown_epochs=3"], "schedule.cooldown_epochs", "method=sampled"),
    (["optim.warmup_epochs=0", "optim.warmup_lr=1e-6"], "optim.warmup_lr", "optim.warmup_epochs above 0"),
    (["model.rel_pos=rope", "optim.decay_rel_pos=false"], "optim.decay_rel_pos", "model.rel_pos=bias"),
    (["loss.mixup=1", "loss.mix_switch_prob=0.5"], "loss.mix_switch_prob", "loss.mixup and loss.cutmix"),
    (["loss.mix_mode=batch"], "loss.mix_mode", "loss.mixup or loss.cutmix"),
    (["data.progressive.end_epoch=3"], "data.progressive.end_epoch", "data.progressive.start_size"),
    (["data.groups=8"], "data.groups", "data.window"),
    (["data.progressive.multiple=8"], "data.progressive.multiple", "data.progressive.start_size"),
    (["model.own_head=true"], "model.own_head", "model.weights"),
    (["compile.mode=off", "compile.max_graphs=3"], "compile.max_graphs", "compile.mode=on"),
    (["compile.mode=off", "compile.cuda_graphs=true"], "compile.cuda_graphs", "compile.mode=on"),
    (["method=dynamicvit", "dynamicvit.kl_weight=1"], "dynamicvit.kl_weight", "dynamicvit.teacher"),
    (["method=dynamicvit", "dynamicvit.distill_weight=0"], "dynamicvit.distill_weight", "dynamicvit.teacher"),
    (["method=dynamicvit", "dynamicvit.rates=0.5", "dynamicvit.rho=0.6"], "dynamicvit.rho", "dynamicvit.rates=none"),
    (["method=sparsifiner", "sparsifiner.l1_weight=1"], "sparsifiner.l1_weight", "sparsifiner.regularizer=l1"),
    (["data.label_maps=maps.npy"], "data.label_maps", "a method that learns from label maps"),
    (["data.gpu_decoding.cpu_share=1", "data.gpu_decoding.hardware_load=0.5"], "hardware_load", "cpu_share below 1"),
]


@pytest.mark.parametrize(("chosen", "name", "reader"), GIVEN, ids=lambda value: str(value))
def test_what_somebody_set_and_nothing_reads_is_refused(chosen, name, reader):
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*{re.escape(reader)}"):
        recipes.get("digits").with_settings(chosen)


@pytest.mark.parametrize(
    ("recipe", "chosen", "gone"),
    [
        ("deit-s-224", ["schedule.name=fixed"], {"form": None, "name": "fixed", "cooldown_epochs": 10}),
        ("deit-s-224", ["schedule.name=list", "schedule.rhos=1,0.5"], {"form": None, "rhos": (1.0, 0.5)}),
        ("deit-s-224", ["loss.mixup=0", "optim.warmup_epochs=0"], {"form": "published"}),
    ],
)
def test_what_a_recipe_brings_along_is_not_there_for_what_does_not_read_it(recipe, chosen, gone):
    section = recipes.get(recipe).with_settings(chosen).section_of(ScheduleConfig)
    assert gone.items() <= vars(section).items()


def test_settings_of_a_recipe_for_what_was_switched_off_have_their_defaults():
    grown = recipes.get("deit-s-224-lowres").with_settings(["data.progressive.start_size=none", "compile.mode=off"])
    assert (grown.data.progressive, grown.compile.max_graphs) == (type(grown.data.progressive)(), 8)
    tuned = recipes.get("vit-b-simmim")
    assert (tuned.optim.warmup_lr, tuned.model.own_head) == (2.5e-7, True)
    tuned = tuned.with_settings(["optim.warmup_epochs=0", "model.weights=none"])
    assert (tuned.optim.warmup_lr, tuned.model.own_head) == (OptimConfig().warmup_lr, False)
    assert Config.from_dict(tuned.to_dict()) == tuned


@pytest.mark.parametrize(
    "change",
    [
        lambda config: replace(config, optim=OptimConfig(warmup_epochs=0, warmup_lr=1e-7)),
        lambda config: replace(config, loss=LossConfig(mix_mode="elem")),
        lambda config: replace(config, model=ModelConfig(own_head=True)),
        lambda config: config.having(ScheduleConfig(name="fixed", high=0.8)),
        lambda config: Config.from_dict(config.to_dict() | {"loss": {"mixup": 0.5, "mix_switch_prob": 0.2}}),
        lambda config: Config.from_dict(config.to_dict() | {"schedule": {"rho": 0.4}}),
    ],
)
def test_python_and_files_are_told_too(change):
    with pytest.raises(SettingError, match=r"which nothing reads in this run: .* would read it"):
        change(recipes.get("digits"))


def test_what_is_off_asks_for_nothing():
    off = ["model.own_head=false", "compile.mode=off", "compile.cuda_graphs=false", "schedule.rho=none",
           "schedule.name=fixed", "schedule.shuffle=false"]  # fmt: skip
    assert recipes.get("digits").with_settings(off).section_of(ScheduleConfig).constant == 0.6


def test_a_file_from_before_schedules_had_settings_of_their_own_is_read():
    whole = {"name": "cyclic", "form": "published", "low": 0.2, "high": 1.0, "rho": 0.6, "rhos": []}
    assert ScheduleConfig.from_dict(whole) == ScheduleConfig()
    with pytest.raises(SettingError, match=r"schedule.rho is 0.4"):
        ScheduleConfig.from_dict(whole | {"rho": 0.4})


# Values that depend on others.


@pytest.mark.parametrize(
    ("recipe", "chosen", "message"),
    [
        (
            "deit-ti-224",
            ["train.batch_size=8"],
            r"comes to 7.81e-06 .* rise in its decay; .*--set optim.min_lr=7.8e-08",
        ),
        ("digits", ["optim.lr=5e-6"], r"optim.min_lr \(1e-05\)"),
        ("digits", ["optim.warmup_lr=0.1"], r"optim.warmup_lr \(0.1\).* fall in its warm-up"),
        ("deit-s-224", ["train.batch_size=4"], r"optim.lr \(0.0005, given for a batch of 512, at 4 images\)"),
        ("digits", ["model.embed_dim=50"], "model.embed_dim is 50, which model.num_heads=3 does not divide"),
        ("digits", ["data.mean=123.675,116.28,103.53"], "on the 0-1 scale: divide values on the 0-255 scale by 255"),
        ("digits", ["data.std=0,0,0"], "each must be at least 0.001"),
        ("digits", ["compile.cuda_graphs=true", "compile.backend=aot_eager"], "compile.backend=aot_eager generates"),
    ],
)
def test_values_that_do_not_suit_each_other_are_refused(recipe, chosen, message):
    with pytest.raises(ValueError, match=message):
        recipes.get(recipe).with_settings(chosen)


def test_the_remedies_for_rates_are_settings_that_do():
    with pytest.raises(ValueError, match=r"optim.min_lr") as refused:
        recipes.get("digits").with_settings(["optim.lr=1e-7"])
    remedies = re.findall(r"--set (\S+)", str(refused.value))
    assert recipes.get("digits").with_settings(["optim.lr=1e-7", *remedies]).optim.lr == 1e-7


def test_an_equal_minimum_is_a_constant_rate():
    assert recipes.get("digits").with_settings(["optim.lr=1e-5"]).optim.min_lr == 1e-5


# Settings that are valid together.


def ascending(low, high):
    return st.lists(st.floats(low, high), min_size=2, max_size=2).map(lambda ends: f"{min(ends)!r},{max(ends)!r}")


SMALL = {
    "model.name": st.sampled_from(
        [*["vit_tiny_patch16_224"] * 6, "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]
    ),
    "model.embed_dim": st.sampled_from(["12", "24", "48"]),
    "model.depth": st.sampled_from(["1", "2"]),
    "model.num_heads": st.sampled_from(["1", "2", "3"]),
    "model.patch_size": st.sampled_from(["4", "8", "16"]),
    "model.weights": st.just("none"),
    "train.loggers": st.sampled_from(["tensorboard", "tensorboard,wandb", "mlflow"]),
    "data.img_size": st.sampled_from(["16", "32"]),
    "data.rand_augment": st.sampled_from(["none", "rand-m9-mstd0.5-inc1-n2", "rand-m0-inc1-n1-p1"]),
    "data.crop_scale": ascending(0.01, 1),
    "data.crop_ratio": ascending(0.01, 100),
    "data.three_augment": st.sampled_from([*["false"] * 6, "true"]),
    "data.repeats": st.sampled_from(["1", "1", "3"]),
    "data.decode_once": st.sampled_from([*"11111112"]),
    "data.label_maps": st.just("none"),
    "data.window": st.sampled_from(["none", "none", "1", "3"]),
    "data.groups": st.sampled_from(["1", "2", "4"]),
    "data.progressive.start_size": st.sampled_from(["none", "none", "16"]),
    "data.progressive.begin_epoch": st.integers(0, 1).map(str),
    "data.progressive.end_epoch": st.integers(1, 4).map(str),
    "data.progressive.multiple": st.sampled_from(["4", "8", "16"]),
    "optim.lr": st.floats(1e-3, 0.1).map(repr),
    "optim.min_lr": st.floats(0, 1e-5).map(repr),
    "optim.warmup_lr": st.floats(0, 1e-5).map(repr),
    "optim.lr_batch": st.sampled_from(["none", "8", "64"]),
    "optim.warmup_epochs": st.sampled_from(["0", "0.3", "1", "1.75"]),
    "optim.cooldown_epochs": st.sampled_from(["0", "0", "0.5", "1"]),
    "compile.mode": st.sampled_from(["auto", "off"]),  # to compile takes longer than all of the rest
    "compile.backend": st.just("inductor"),
    "train.epochs": st.integers(5, 40).map(str),
    "train.batch_size": st.sampled_from(["4", "8"]),
    "train.accumulate": st.sampled_from(["1", "2", "4"]),
    "train.max_steps": st.just("none"),
    "train.log_every_steps": st.integers(1, 4).map(str),
    "schedule.cooldown_epochs": st.integers(0, 5).map(str),
    "dynamicvit.places": st.sampled_from(["none", "0"]),  # one place in a model of one block or two
    "dynamicvit.rates": st.sampled_from(["none", "0.6"]),
    "dynamicvit.teacher": st.just("none"),
    "dynamicvit.frozen_epochs": st.sampled_from(["none", "0", "2", "5"]),
    "method": st.sampled_from(["sampled", "sampled", "dense", "dynamicvit", "sparsifiner"]),
    "sparsifiner.dense_epochs": st.sampled_from(["none", "0", "1", "2"]),
    "sparsifiner.keep": st.sampled_from(["0.25", "0.9", "0.01"]),  # one for each block is too many of one block
    "sparsifiner.num_down": st.sampled_from(["none", "1", "2"]),
    "sparsifiner.predictor_epochs": st.sampled_from(["none", "1", "2"]),
    "sparsifiner.predictor_lr": st.sampled_from(["3e-4", "1e-2"]),
    "sparsifiner.teacher": st.just("none"),
}
"""Of fields whose range holds more than a test can train."""


DRAWN = st.fixed_dictionaries(
    {field.name: SMALL[field.name] if field.name in SMALL else inside(field.hint) for field in FIELDS}
)
NAMES = "|".join(re.escape(field.name) for field in FIELDS)


def accepted(chosen):
    """A configuration with all of the settings that something reads, as each refusal says which one to leave out; or
    what is wrong with them together."""
    chosen = dict(chosen)
    while True:
        words = [f"{name}={text}" for name, text in chosen.items()]
        try:
            config = recipes.get("digits").with_settings(words)
            check_machine(config, words, device="cpu", backends={"memory"})
            check_shapes(config)
            check_steps(config, 40 // config.train.batch_size)
            return config
        except ValueError as error:
            unread = re.search(r"leave (\S+) out$|there is no key '(\S+)' with method", str(error))
            if unread is None:
                return str(error)
            del chosen[unread[1] or unread[2]]


def trains_resumes_and_evaluates(config, output):
    size = config.data.img_size
    for stop in (2, 3):
        one = replace(config, train=replace(config.train, max_steps=stop))
        loaders = [
            MemoryLoader(40, img_size=size, batch_size=config.train.batch_size, train=train, size=shown)
            for train, shown in ((True, config.data.train_size), (False, None))
        ]
        trainer = Trainer(one, *loaders, classes=list("abcd"), output=output, world=HERE)
        assert trainer.step == (0 if stop == 2 else 2)
        assert trainer.method.course().startswith(f"{trainer.method.knob}: ")
        trainer.fit()
        assert trainer.step == stop
    (output / "config.json").write_text(config.to_json(), encoding="utf-8")
    method = load_run(output, HERE.device).method
    with torch.inference_mode():
        for point in method.points():
            logits = method.predict(torch.zeros(2, 3, size, size), point)
            assert logits.shape == (2, 4)
            assert logits.isfinite().all()


@pytest.mark.parametrize("examples", [6, pytest.param(60, marks=EXHAUSTIVE)])
def test_settings_of_all_fields_are_refused_in_a_sentence_or_train(examples, tmp_path_factory, capsys):
    counts = Counter()

    @settings(
        max_examples=examples, database=None, derandomize=examples < 10,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(DRAWN)
    def holds(chosen):
        config = accepted(chosen)
        if isinstance(config, str):
            assert re.fullmatch(f".*({NAMES}).*", config)  # of one line
            counts["refused"] += 1
            return
        assert Config.from_dict(config.to_dict()) == config
        trains_resumes_and_evaluates(config, tmp_path_factory.mktemp("run"))
        counts["trained"] += 1

    holds()
    with capsys.disabled():
        print(f"\nof {counts.total()} drawn settings of all fields {counts['trained']} train", end=" ")
    assert counts["trained"] >= counts.total() / 3

"""Two hundred mistakes on the three command lines: exit code 2, one sentence on stderr, nothing left behind.

All are made in this process; some of them, drawn by their number, also in a process of their own.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import warm

import cli.convert
import cli.eval
import cli.train
from cli.errors import run

ROOT = Path(__file__).parents[2]
APPS = {"train": cli.train.app, "eval": cli.eval.app, "convert": cli.convert.app}

# What `{data}` stands for is made by the fixture; `out` is a name in an empty folder, which is the current one.
SETTINGS = """
model.name= model.name=vit_tiny_patch61_224 model.name=resnet18 model.name=nowhere:Model model.rel_pos=learned
model.sort=size model.token_counts=8 model.qkv_bias=yes model.init=zeros model.patch_size=0 model.patch_size=7
model.patch_size=-8 model.embed_dim=0 model.embed_dim=50 model.embed_dim=1e3 model.depth=0 model.depth=1.5
model.num_heads=0 model.num_heads=5 model.num_heads=9999999 model.global_pool=max model.drop_path_rate=2
model.drop_path_rate=nan model.drop_path_rate=1 model.own_head=true model.own_head=maybe model.weights=
data.img_size=0 data.img_size=33 data.img_size=1000000000 data.img_size=32.5 data.crop_scale=1,0.5 data.crop_scale=0.5
data.crop_scale=0,1 data.crop_ratio=2,1 data.crop_ratio=1,inf data.crop_ratio=-1,1 data.flip=1.1 data.flip=often
data.interpolation=nearest data.rand_augment=rand data.rand_augment=m9 data.rand_augment=rand-m99-inc1
data.rand_augment=rand-n0-inc1 data.rand_augment=rand-n999999999-inc1 data.three_augment=3 data.erasing=-0.1
data.repeats=0 data.repeats=257 data.decode_once=1000 data.crop_pct=0 data.crop_pct=1.5 data.mean=123.7,116.3,103.5
data.mean=0.5 data.mean=-1,0,0 data.std=0,0,0 data.std=58.4,57.1,57.4 data.std=1,1,nan data.label_maps=maps.npy
data.progressive.start_size=0 data.progressive.end_epoch=5 data.progressive.begin_epoch=1 data.progressive.multiple=16
data.gpu_decoding.cpu_share=2 data.gpu_decoding.pipelines=0 data.gpu_decoding.preallocate=1
data.gpu_decoding.hardware_load=none optim.lr=0 optim.lr=-1e-3 optim.lr=inf optim.lr=1e31 optim.lr=1e-8
optim.lr_batch=0 optim.lr_batch=-512 optim.min_lr=-1 optim.min_lr=1 optim.warmup_lr=nan optim.warmup_epochs=-3
optim.warmup_epochs=99 optim.warmup_epochs=inf optim.cooldown_epochs=-1 optim.cooldown_epochs=51
optim.weight_decay=nan optim.weight_decay=-1 optim.betas=0.9 optim.betas=0.9,1 optim.betas=0.9,0.99,0.999
optim.decay_rel_pos=2 optim.layer_decay=0 optim.layer_decay=1.1 optim.clip_grad=-1 optim.clip_grad=0
optim.clip_grad=nan loss.label_smoothing=1 loss.mixup=nan loss.mixup=-0.1 loss.cutmix=inf loss.mix_switch_prob=3
loss.mix_switch_prob=0.3 loss.mix_mode=elem loss.mix_mode=image compile.mode=yes compile.max_graphs=0
compile.backend=eager compile.cuda_graphs=5 train.epochs=0 train.epochs=1000000000000 train.epochs=3.5
train.batch_size=0 train.batch_size=1000000000000000 train.batch_size=x train.seed=-1 train.seed=9223372036854775808
train.seed=99999999999999999999999999 train.precision=fp16 train.parallel=dp train.accumulate=0
train.checkpoint_activations=x train.max_skipped=0 train.timeout_seconds=0 train.timeout_seconds=inf train.ema_decay=1
train.ema_decay=-0.5 train.num_workers=100000 train.num_workers=-1 data.prefetch_gb=inf data.prefetch_gb=-1
train.prefetch_mb=512 train.log_every_steps=0 train.checkpoint_every_minutes=-1 train.checkpoint_every_minutes=0
train.checkpoint_every_minutes=nan train.keep_checkpoints=0 train.max_steps=0 train.max_steps=-5 train.max_steps=all
method=dnese method=a.b:C schedule.name=cyc schedule.name=list schedule.form=cut schedule.form=round schedule.low=0
schedule.low=0.5 schedule.high=1.2 schedule.rho=0.4 schedule.rho=2 schedule.rhos=0.5,1 schedule.rhos=0.5,2
schedule.lengths=3,1 schedule.lengths=0,1 schedule.period_steps=0 schedule.period_steps=999999999 schedule.shuffle=x
schedule.cooldown_epochs=-1 schedule.cooldown_epochs=51 train.epoch=3 epochs=3 train.epochs recipe=other
"""

TRAIN = """
digit ; digits extra ; digits --nope ; digits --data ; digits --loader webp ; digits --gpus 0 --plan
digits --gpus many --plan ; digits --nodes -1 --plan ; digits --gpus 99999999 --plan ; digits --loader-rate 0 --plan
digits --loader-rate nan --plan ; digits --gpu-rate inf --loader-rate 5 --plan ; digits --loader-rate 1e300 --plan
digits --gpus 2 --plan ; digits --gpu-rate 5 --plan ; digits --loader-rate 5 ; digits ; digits --data {data}
digits --output out ; digits --doctor ; digits --plan --data nowhere ; digits --data nowhere --output out
digits --data {data} --output . ; digits --data {data} --output {data}
digits --data {data} --output {data}/train/run ; digits --data {data} --output {images}
digits --data {data} --output {file} ; digits --plan --set train.epochs=100000
digits --data {data} --output out --set train.batch_size=100000
digits --data {data} --output out --set train.batch_size=9 --set train.accumulate=2
digits --data {data} --output out --set data.gpu_decoding.pipelines=2 --loader torch
digits --data {data} --output out --set compile.max_graphs=3 --loader torch
digits --data {data} --output out --set optim.warmup_epochs=0.001 --loader torch
digits --data {data} --output out --set model.weights=gone.pth --loader torch
digits --plan --set schedule.name=fixed --set schedule.low=0.4 ; digits --plan --set method=dense --set schedule.rho=1
digits --plan --set schedule.name=linear --set schedule.period_steps=7 ; deit-ti-224 --plan --set train.batch_size=8
digits --plan --set schedule.low=0.8 --set schedule.high=0.4
digits --plan --set schedule.name=stages --set schedule.lengths=1,2,3
digits --plan --set schedule.name=stages --set schedule.lengths=100000000,1
digits --plan --set compile.mode=off --set compile.max_graphs=4
digits --plan --set data.progressive.start_size=16 --set data.progressive.end_epoch=50
digits --plan --set data.progressive.start_size=20 --set data.progressive.end_epoch=5
digits --plan --set model.rel_pos=rope --set model.embed_dim=90
digits --plan --set optim.warmup_epochs=0 --set optim.warmup_lr=0.1
digits --plan --set data.repeats=2 --set data.decode_once=2 ; deit-s-224 --plan --set data.three_augment=true
digits --plan --set train.parallel=fsdp --set compile.mode=on
digits --data {data} --output out --budget-hours 0 ; digits --data {data} --output out --budget-hours nan
digits --data {data} --output out --budget-of-dense -1 ; digits --plan --budget-hours 1
digits --data {data} --output out --budget-hours 1 --budget-of-dense 1
digits --data {data} --output out --budget-hours 1 --set train.epochs=3 ; digits --show --budget-hours 1
digits --data {data} --output out --budget-of-dense 1 --set train.max_steps=3
digits --data {data} --plan --gpu h100 --budget-hours 1 ; digits --data {data} --doctor --budget-of-dense 0.5
digits --data {data} --output out --budget-hours 1e-9 --loader torch
"""

EVAL = """
--nope ; nowhere ; nowhere --data {data} ; {images} --data {data} ; resnet18=gone.pth --data {data}
timm:nothing --data {data} ; run --data {data} --rho 0 ; run --data {data} --rho 1.2 ; run --data {data} --rho -1
run --data {data} --rho nan ; run --data {data} --rho inf ; run --data {data} --rho a ; run --data {data} --rho 1:2
run --data {data} --rho : ; run --data {data} --rho 0.2:inf:0.1 ; run --data {data} --rho 0.2:1:1e-12
run --data {data} --rho 0.2:1:0 ; run --data {data} --rho 0.2:1:nan ; run --data {data} --rho 1:0.2:0.1
run --data {data} --rho 0.2:1:0.1:2 ; run --data {data} --rho 1e-999 ; run --data {data} --rho 0.5,,x
run --data {data} --rho 0,5 ; run --batch-size 0 --data {data} ; run --batch-size 99999999999 --data {data}
run --batch-size x --data {data} ; run --batch 0 --budget-ms 5 ; run --batch 4 ; run --batch 99999999999 --budget-ms 5
run --budget-ms -1 ; run --budget-ms nan ; run --budget-ms inf ; run --target-ips -3
run --max-drop nan --data {data} ; run --budget-ms 5 --max-drop 1 ; run --max-drop 1 ; run --rho 0.5
run other --budget-ms 5 ; run --dynamic ; run --export model.h5 --dynamic ; run --export m.pt2 --rho 0.5 --push there
run --license mit --data {data} ; run --push there --license Mine! --data {data}
run --cascade 0.5 --data {data} ; run --cascade a --data {data} ; run --cascade auto
run --target-gmacs 1 --data {data} ; run other --cascade auto --data {data}
run --fit-split val --data {data} ; run --cascade auto --target-ips 5 --data {data}
run --cascade auto --export m.onnx --int8 --data {data}
run --loader jpeg --data {data} ; run --sort size --data {data} ; run --data nowhere
"""

CONVERT = """
--nope ; digits ; digits out ; digits out --format tar ; digits out --format dali,zip ; nowhere out --format dali
{images} {images} --format dali ; digits out --format dali --jobs 0 ; digits out --format dali --jobs 1000000
digits out --format dali --jobs x ; digits out --format dali --quality 0 ; digits out --format dali --quality 101
digits out --format dali --shard-size 0 ; digits out --format dali --shard-size -5
digits out --format dali --seed -1 ; digits out --format dali --seed 99999999999999999999
digits out --format dali --max-size 1 ; digits out --format dali --max-size 99999
digits out --format dali --val-fraction 0 ; digits out --format dali --val-fraction nan
digits out --format dali --val-fraction 1 ; digits out --format dali --on-error ignore
digits out --format dali --engine spark ; digits out --format ffcv --profile tiny
digits out --format ffcv --profile jpg500 --max-size 300 ; digits out --format dali --part 3/2
digits out --format dali --part x ; digits out --format dali --part 0/2
digits out --format dali --part 1/2 --restart ; nowhere --verify ; {images} --verify ; digits --full ; nowhere --merge
"""


def commands(text):
    """Several to a line, with semicolons between them; none of the words is a command line, too."""
    return ["", *(line.strip() for part in text.splitlines() for line in part.split(";") if line.strip())]


MISTAKES = [
    *(("train", f"digits --plan --set {setting}") for setting in SETTINGS.split()),
    *(("train", line) for line in commands(TRAIN)),
    *(("eval", line) for line in commands(EVAL)),
    *(("convert", line) for line in commands(CONVERT)),
]


def test_there_are_two_hundred_of_them():
    assert len(set(MISTAKES)) == len(MISTAKES) > 200


@pytest.fixture(scope="module")
def places(image_root, tmp_path_factory):
    file = tmp_path_factory.mktemp("file") / "file"
    file.write_text("text")
    return {"data": image_root, "images": image_root / "train" / "cat", "file": file}


def listing(folders):
    return sorted(str(path) for folder in folders for path in Path(folder).rglob("*"))


def assert_one_sentence(said, line):
    assert "Traceback" not in said, said
    *before, last = said.splitlines()
    assert re.fullmatch(r"error: \S.{10,}", last), said
    assert not [word for word in before if not word.startswith(("digits: starting", "ρ: ", "--loader auto"))], said
    assert len(re.findall("error:", said)) == 1, said


@pytest.mark.parametrize("shard", range(8))
def test_a_mistake_is_one_sentence_and_leaves_nothing(shard, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = listing([tmp_path, places["data"]])
    for command, line in MISTAKES[shard::8]:
        with pytest.raises(SystemExit) as left:
            run(APPS[command], line.format(**places).split())
        told = capsys.readouterr().err
        assert left.value.code == 2, (command, line, told)
        assert_one_sentence(told, line)
        assert listing([tmp_path, places["data"]]) == before, line


@pytest.mark.parametrize("every", [30, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_so_it_is_in_a_process_of_its_own(every, places, tmp_path):
    before = listing([tmp_path, places["data"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command, line in MISTAKES[7::every]:
        done = warm.run(
            [sys.executable, "-m", f"cli.{command}", *line.format(**places).split()],
            cwd=tmp_path, env=environment, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2, (command, line, done.stderr)
        assert_one_sentence(done.stderr, line)
        assert listing([tmp_path, places["data"]]) == before, line

"""pss models by timm's own means: `timm.create_model("pss_NAME")`, and published folders that name such a model.

`import pss` loads neither torch nor timm: a finder waits for timm, and registers the models once it is imported, in
whichever order. Every name that `pss.create_model` takes is registered with `pss_` before it. Pretrained weights are
timm's own for that name, or those of a published folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "pss_"

OWN_NAMES: dict[str, float | None] = {
    "lvvit_t": 0.9, "lvvit_s": 0.9, "lvvit_m": 1.0, "lvvit_l": 1.0, "simmim_base_patch16": None,
}  # fmt: skip
"""Models that timm does not have, and the share of an image that is shown in evaluation where that is settled."""

# What timm builds from a ViT's class, and is no plain ViT: other pooling, other blocks, or patches that do not fit.
_NOT_PLAIN = re.compile(r"siglip_\d|patch14_siglip_gap_384|_rpn_|18x2|_xp_|_(d|p|dp)wee_|_dlittle_|_map_|^test_vit3$")
_TIMM = "timm.models"
_FOLDER = "the published folder"

__all__: list[str] = []
default_cfgs: dict[str, Any] = {}
"""timm looks here for what it knows of a model's weights and images."""


def install() -> None:
    """Register the models with timm, now or as soon as it is imported."""
    if _TIMM in sys.modules:
        _register()
    elif not any(isinstance(one, _Waiting) for one in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds timm by the other finders, registers the models once it is imported, and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TIMM:
            return None
        others = [one for one in sys.meta_path if one is not self and hasattr(one, "find_spec")]
        spec = next(filter(None, (one.find_spec(fullname, path, target) for one in others)), None)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        run: Callable[[ModuleType], None] = loader.exec_module

        def then_register(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = then_register
        return spec


def _register() -> None:
    from timm.models import generate_default_cfgs, get_pretrained_cfg, is_model, list_models, register_model

    if default_cfgs:
        return
    tagged = [one for kind in ("vision_transformer", "deit") for one in list_models(module=kind, include_tags=True)]
    theirs = [one for one in tagged if not _NOT_PLAIN.search(one.partition(".")[0])]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(one.partition(".")[0] for one in theirs):
        first = get_pretrained_cfg(name).tag or ""  # the one that goes by the name alone
        found[f"{PREFIX}{name}.{first}".rstrip(".")] = _without_code(get_pretrained_cfg(name))
    for one in theirs:
        found.setdefault(PREFIX + one, _without_code(get_pretrained_cfg(one)))
    for name, crop_pct in OWN_NAMES.items():
        found[PREFIX + name] = _own_cfg(name, crop_pct)
    default_cfgs.update(generate_default_cfgs(found))
    module = sys.modules[__name__]
    for name in dict.fromkeys(one.partition(".")[0] for one in found):
        if not is_model(name):
            entry = _entry(name)
            setattr(module, name, entry)
            register_model(entry)


def _without_code(cfg: Any) -> Any:
    """Without what only code of timm's models can read."""
    return replace(cfg, custom_load=False, url=None) if cfg.custom_load else cfg


def _own_cfg(name: str, crop_pct: float | None) -> Any:
    from timm.models import PretrainedCfg

    lvvit = name.startswith("lvvit")
    return PretrainedCfg(
        input_size=(3, 224, 224),
        fixed_input_size=True,
        **({} if crop_pct is None else {"crop_pct": crop_pct}),
        first_conv="patch_embed.conv1" if lvvit else "patch_embed.proj",
        classifier=("head", "aux_head") if lvvit else "head",
    )


def _entry(variant: str) -> Callable[..., Any]:
    """What timm calls for a model of that name."""

    def build(pretrained: bool = False, **options: Any) -> Any:
        from timm.models import build_model_with_cfg

        _check_asked(options.get("pretrained_model_args") or {})
        return build_model_with_cfg(
            partial(_create, variant.removeprefix(PREFIX)),
            variant,
            pretrained,
            pretrained_filter_fn=_fitted,
            feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
            **options,
        )

    build.__name__ = build.__qualname__ = variant
    build.__doc__ = f"`pss.create_model({variant.removeprefix(PREFIX)!r})`, with timm's arguments and pss's."
    return build


def _check_asked(asked: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what no published folder asks for."""
    from pss.models.interface.asked import check_setting, is_whole

    for key, value in asked.items():
        if key in ("num_classes", "in_chans"):
            fits = is_whole(value, 0, 1 << 24)
        elif key == "img_size":
            sides = value if isinstance(value, list | tuple) else [value]
            fits = len(sides) <= 2 and all(is_whole(side, 1, 1 << 14) for side in sides)
        else:
            check_setting(key, value, _FOLDER)
            continue
        if not fits:
            raise ValueError(f"{_FOLDER} has {key} {str(value)[:60]!r}; restore its config.json")


def _create(name: str, *, in_chans: int = 3, global_pool: str | None = None, **settings: Any) -> Any:
    """`pss.create_model` with what timm passes besides."""
    from pss.models.create import create_model

    if in_chans != 3:
        raise ValueError(f"{PREFIX}{name} takes images of 3 channels, got in_chans={in_chans}; leave it out")
    if isinstance(settings.get("img_size"), list):
        settings["img_size"] = tuple(settings["img_size"])
    pool: dict[str, Any] = {} if not global_pool else {"global_pool": global_pool}
    model = create_model(name, **settings, **pool)
    if global_pool == "":
        model.reset_classifier(model.num_classes, "")
    return model


def _fitted(weights: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Weights of timm, or of a published folder, as the state of `model`: brought to its patch grid and its names.

    Raises:
        ValueError: they are of another model.
    """
    from pss.models.files import unwrap
    from pss.models.weights import fill

    found = unwrap(weights, f"the file of weights for {model.name}")
    told = found.settings or {}
    if "img_size" not in told and (size := _size_of(found.tensors, model)) is not None:
        found = replace(found, settings=told | {"img_size": size})
    head = found.tensors.get("head.weight")
    fill(model, found, ignore_head=head is None or head.shape[0] != model.num_classes)
    state: dict[str, Any] = model.state_dict()
    return state


def _size_of(tensors: Mapping[str, Any], model: Any) -> list[int] | None:
    """Height and width of the images that weights are for, as timm tells them, if they have as many positions."""
    from pss.models.files import patch_size_of

    told = (model.source_cfg or {}).get("input_size")
    if told is None or "pos_embed" not in tensors:
        return None
    rows, columns = (side // part for side, part in zip(told[1:], patch_size_of(tensors), strict=True))
    fits = tensors["pos_embed"].shape[1] - rows * columns in (0, model.num_prefix_tokens)
    return list(told[1:]) if fits else None

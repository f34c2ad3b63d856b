"""What a published folder may ask a model to be built with: a closed list, with the largest number of each."""

from __future__ import annotations

from typing import Any

# The weights bound it further: nothing is built that they do not fill.
_NUMBERS = {"patch_size": 1 << 10, "embed_dim": 1 << 16, "depth": 1 << 10, "num_heads": 1 << 10, "reg_tokens": 1 << 10}
_RATES: dict[str, float] = {
    "drop_path_rate": 1,
    "drop_rate": 1,
    "pos_drop_rate": 1,
    "proj_drop_rate": 1,
    "attn_drop_rate": 1,
}
_RATES |= {"mlp_ratio": 64, "init_values": 1 << 10}
_FLAGS = {"class_token", "no_embed_class", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "pre_norm"}
_FLAGS |= {"final_norm", "fc_norm", "pool_include_prefix"}
_COUNTS = {"block_heads": 1 << 10, "block_neurons": 1 << 18}
"""Of every block, in a list: what is left of one that was pruned."""

OWN = ("rel_pos", "sort", "token_counts", "qkv_bias", "init")
"""What `pss.create_model` takes beside the settings of timm's model."""
_WORDS = (*OWN, "global_pool", "pos_embed", "norm_layer", "act_layer")


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer within these bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_setting(key: str, value: Any, file: str) -> None:
    """Raise `ValueError` for what no published folder asks for; `file` is where it was found."""
    number: float = value if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
    fits = (
        (key in _NUMBERS and is_whole(value, 0 if key == "reg_tokens" else 1, _NUMBERS[key]))
        or (key in _RATES and 0 <= number <= _RATES[key])
        or (key == "init_values" and value is None)
        or (key in _FLAGS and isinstance(value, bool))
        or (key in _WORDS and isinstance(value, str) and len(value) < 40)
        or (
            key in _COUNTS
            and isinstance(value, list)
            and len(value) <= _NUMBERS["depth"]
            and all(is_whole(one, 1, _COUNTS[key]) for one in value)
        )
    )
    if not fits:
        known = any(key in names for names in (_NUMBERS, _RATES, _FLAGS, _WORDS, _COUNTS))
        what = f"{key} {str(value)[:60]!r}" if known else f"a setting {key[:40]!r}, which no model has"
        raise ValueError(f"{file} has {what}; restore it, or have pss-eval --push write it again")

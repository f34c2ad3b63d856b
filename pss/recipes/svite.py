"""SViTE's runs on ImageNet-1k (Chen et al., NeurIPS 2021): DeiT trained sparse from scratch, 600 epochs.

As in the authors' scripts: densities 0.3 to 0.7 (`--set svite.density=0.4`), of heads and neurons
(`--set s2vite.head_density=0.5 --set s2vite.mlp_density=0.5`), and shares of the tokens 0.95, 0.9, 0.7 and 0.5
(`--set svite.keep=0.7`). Their patch embedding and classifier are sparse too: `--set svite.weights=release`.
"""

from __future__ import annotations

from dataclasses import replace

from pss.recipes.deit import deit_s_224_plain
from pss.sections import MethodSection, RunSettings


def _sparse(recipe: str, own: MethodSection, size: str = "small", batch_size: int = 512) -> RunSettings:
    """Plain DeiT for twice its epochs, with masks that move."""
    plain = deit_s_224_plain()
    return replace(
        plain,
        recipe=recipe,
        method=own.section,
        model=replace(plain.model, name=f"deit_{size}_patch16_224"),
        own=(own,),
        train=replace(plain.train, epochs=600, batch_size=batch_size),
    )


def svite_s() -> RunSettings:
    """SViTE on DeiT-S at 224 px with half of the blocks' weights, 600 epochs from scratch, 80 updates."""
    from pss.methods.svite import SViTESettings  # with torch behind it, which a list can do without

    return _sparse("svite-s", SViTESettings(density=0.5, interval=15_000))


def svite_ti() -> RunSettings:
    """SViTE on DeiT-Ti at 224 px with half of the blocks' weights, 600 epochs from scratch, 60 updates.

    Others quote 70.18 % top-1 from the paper.
    """
    from pss.methods.svite import SViTESettings  # with torch behind it, which a list can do without

    return _sparse("svite-ti", SViTESettings(density=0.5, interval=20_000), "tiny")


def svite_b() -> RunSettings:
    """SViTE on DeiT-B at 224 px with 60 % of the blocks' weights, 600 epochs from scratch. Published: 81.56 % top-1."""
    from pss.methods.svite import SViTESettings  # with torch behind it, which a list can do without

    return _sparse("svite-b", SViTESettings(density=0.6, interval=7_000), "base", 1024)


def svite_plus_s() -> RunSettings:
    """SViTE+ on DeiT-S at 224 px: half of the weights and 95 % of the tokens. Published: 80.18 % top-1.

    With `--set svite.keep=0.9` 79.91 %; with that and `--set svite.density=1`, the selector alone, 78.67 %.
    """
    from pss.methods.svite import SViTESettings  # with torch behind it, which a list can do without

    return _sparse("svite-plus-s", SViTESettings(density=0.5, keep=0.95, interval=15_000))


def s2vite_s() -> RunSettings:
    """S²ViTE on DeiT-S at 224 px, 4 of 6 heads and 60 % of the neurons, 600 epochs from scratch.

    Quoted by others: 79.22 % top-1 at 14.6 M parameters and 3.1 G.
    """
    from pss.methods.s2vite import S2ViTESettings  # with torch behind it, which a list can do without

    return _sparse("s2vite-s", S2ViTESettings(head_density=0.7, mlp_density=0.6, interval=15_000))


def s2vite_ti() -> RunSettings:
    """S²ViTE on DeiT-Ti at 224 px, 2 of 3 heads and 70 % of the neurons, 600 epochs from scratch.

    Quoted by others: 70.12 % top-1 at 4.2 M parameters and 0.9 G.
    """
    from pss.methods.s2vite import S2ViTESettings  # with torch behind it, which a list can do without

    return _sparse("s2vite-ti", S2ViTESettings(head_density=0.7, mlp_density=0.7, interval=20_000), "tiny")


def s2vite_b() -> RunSettings:
    """S²ViTE on DeiT-B at 224 px, 8 of 12 heads and 60 % of the neurons, 600 epochs. Published: 82.22 % top-1."""
    from pss.methods.s2vite import S2ViTESettings  # with torch behind it, which a list can do without

    own = S2ViTESettings(head_density=0.7, mlp_density=0.6, interval=7_000)
    return _sparse("s2vite-b", own, "base", 1024)


def s2vite_plus_s() -> RunSettings:
    """S²ViTE+ on DeiT-S at 224 px: 4 of 6 heads, 60 % of the neurons and 95 % of the tokens; no published accuracy."""
    from pss.methods.s2vite import S2ViTESettings  # with torch behind it, which a list can do without

    own = S2ViTESettings(head_density=0.7, mlp_density=0.6, keep=0.95, interval=15_000)
    return _sparse("s2vite-plus-s", own)

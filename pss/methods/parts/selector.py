"""The token selector of SViTE+ (Chen et al., 2021): a linear scorer on the embedded patches keeps the best k."""

from __future__ import annotations

import math

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from pss.methods.parts.policy import gumbel
from pss.models.sampling import TokenCounts, highest, num_kept_tokens

HOTTEST, COLDEST = 10.0, 0.1
"""Temperatures of the first and the last step."""


def temperature(step: int, total_steps: int) -> float:
    """Linear over the run."""
    return HOTTEST + (COLDEST - HOTTEST) * min(1.0, step / max(1, total_steps - 1))


def num_selected(keep: float, num_patches: int, num_prefix: int, counts: TokenCounts = "published") -> int:
    """Patches that are kept at a share `keep` of all tokens, prefix included, halves rounded up; one at least.

    Of 197 tokens 187, 177, 138 and 99 are left at 0.95, 0.9, 0.7 and 0.5, the class token among them.
    """
    if counts == "aligned":
        return num_kept_tokens(keep, num_patches, num_prefix, counts) - num_prefix
    tokens = math.floor(round(keep * (num_patches + num_prefix), 9) + 0.5)
    return max(1, tokens - num_prefix)


class Selector(nn.Module):
    """Scores patches, and draws those that go on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scorer = nn.Linear(width, 1, bias=False)  # a bias would cancel in the softmax
        trunc_normal_(self.scorer.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of tokens (B, n, D), (B, n), at least in float32."""
        scores: Tensor = self.scorer(tokens).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def draw(
        self, patches: Tensor, count: int, temperature: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Training: the `count` best patches of each image under Gumbel noise.

        Args:
            patches: (B, n, D).
            count: Of those that go on.
            temperature: Of the softmax whose derivative the choice has (straight-through).
            generator: Of the noise, on the device of the patches.

        Returns:
            Factors of the kept patches, all 1, whose gradient is that of their soft choice, (B, count), and their
            indices, ascending, (B, count). Patches that are left out are seen by nothing, and learn through the
            softmax's sum.
        """
        noisy = self(patches).log_softmax(-1) + gumbel(patches.shape[:2], generator, patches.device)
        soft = (noisy / temperature).softmax(-1)
        kept = highest(noisy.detach(), count, never_negative=False)  # small temperatures make zeros of `soft`
        chosen = soft.gather(1, kept)
        return 1 + (chosen - chosen.detach()), kept

    def best(self, patches: Tensor, count: int) -> Tensor:
        """Evaluation: indices of the `count` best patches, ascending, (B, count)."""
        return highest(self(patches), count, never_negative=False)

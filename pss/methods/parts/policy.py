"""What DynamicViT is made of: attention that hides keys, predictors, the draw of what is kept, and losses.

Sections and equations are those of Rao et al., 2021 (https://arxiv.org/abs/2106.02034).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from pss.attention.attend import Attention
from pss.models.vit import VisionTransformer

KEEP = 0
"""Which of a predictor's two classes keeps a patch; the paper's equations have it the other way round."""


def policy_softmax(logits: Tensor, policy: Tensor, eps: float, *, reference: bool = False) -> Tensor:
    """Softmax over the keys that a policy leaves (supplement of the paper; equation of attentive masking).

    The gate multiplies, so that a hidden key has a derivative by its gate and can come back. Every token sees itself.

    Args:
        logits: (B, H, T, T).
        policy: 1 for a key that is seen and 0 for one that is not, (B, T).
        eps: Added to every row, spread evenly over the keys.
        reference: Take a row's largest logit over hidden keys too. That may leave nothing of those that are seen, and
            where a hidden key beats them, the derivative by its gate grows exponentially with its lead.

    Returns:
        (B, H, T, T), at least in float32.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    num_keys = logits.shape[-1]
    itself = torch.eye(num_keys, dtype=torch.bool, device=logits.device)
    gate = torch.where(itself, policy.new_ones(()), policy[:, None, None, :])  # (B, 1, T, T)
    seen = logits.detach() if reference else logits.detach().masked_fill(gate == 0, -torch.inf)
    # The ceiling touches hidden keys alone, which then pull no harder at their gates than the largest one that is seen.
    shares = (logits - seen.amax(-1, keepdim=True)).clamp(max=0).exp() * gate
    return (shares + eps / num_keys) / (shares.sum(-1, keepdim=True) + eps)


class PolicyAttention(Attention):
    """Attention that hides the keys a policy drops; without a policy it is the attention it was made from."""

    def __init__(self, source: Any, eps: float, reference: bool) -> None:
        super().__init__(source)
        self.eps, self.reference = eps, reference

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        policy: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, T, D) to tokens (B, T, D); `policy` as in `policy_softmax`."""
        if policy is None:
            return super().forward(x, positions, attn_mask=attn_mask)
        assert attn_mask is None
        q, k, v = self.project_in(x, positions)
        weights = policy_softmax(self.logits(q, k, positions), policy, self.eps, reference=self.reference)
        if not self.reference:  # the authors' code has a rate and never drops
            weights = self.attn_drop(weights)
        return self.project_out(weights.to(v.dtype) @ v)


def check_hides(model: VisionTransformer, method: str) -> None:
    """Raise `ValueError` where losses would be taken of patches that a method of that name has hidden."""
    kind, pooling = type(model), model.global_pool
    # Where patches are classified, too, the image's loss is of the class token's answer alone.
    apart = model.patch_share is not None and pooling == "token"
    if not (apart or kind.readout is VisionTransformer.readout) or kind.pooled is not VisionTransformer.pooled:
        raise ValueError(
            f"method {method} cannot hide patches from the readout of {kind.__name__}; use a model.name whose "
            "classifier reads the class token, or the mean of the patches"
        )
    if pooling not in ("token", "avg"):
        raise ValueError(f"method {method} cannot hide patches from model.global_pool={pooling}; use token or avg")


def quarters(depth: int) -> tuple[int, ...]:
    """Where a model of that many blocks drops patches unless told otherwise: 3, 6 and 9 of 12, 1, 2 and 3 of 4."""
    places = {stage * depth // 4 for stage in (1, 2, 3)}
    return tuple(sorted(places - {0})) or (0,)


class Predictor(nn.Module):
    """Whether each patch is kept, from its own features and the mean of those still there (section 3.2)."""

    def __init__(self, width: int, *, reference: bool = False) -> None:
        super().__init__()
        self.reference = reference
        self.local = width // 2
        self.inwards = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.outwards = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )
        for part in self.modules():
            if isinstance(part, nn.Linear):
                trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(self, patches: Tensor, kept: Tensor | None = None) -> Tensor:
        """Log-probabilities of keeping and dropping, (B, N, 2), at least in float32.

        Args:
            patches: (B, N, D).
            kept: 1 for a patch that is still there, else 0, (B, N); None if all are.
        """
        features = self.inwards(patches)
        local, shared = features[..., : self.local], features[..., self.local :]
        if kept is None:
            mean = shared.mean(1, keepdim=True)
        else:
            count = kept.sum(1)[:, None, None]
            mean = (shared * kept[..., None]).sum(1, keepdim=True) / (count if self.reference else count.clamp(min=1))
        joined = torch.cat((local, mean.to(local.dtype).expand(-1, local.shape[1], -1)), dim=-1)
        answer: Tensor = self.outwards(joined)
        return answer.to(torch.promote_types(answer.dtype, torch.float32)).log_softmax(-1)


def gumbel(shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise, float32; the generator is one of the device."""
    return -torch.empty(shape, device=device).exponential_(generator=generator).log()


def decide(log_probabilities: Tensor, noise: Tensor) -> Tensor:
    """What is kept, 0 or 1, (B, N), for log-probabilities and Gumbel noise (B, N, 2).

    With the probability that the predictor gives, and with the softmax's derivative: straight-through Gumbel-softmax
    (Jang et al., 2017) at temperature 1.
    """
    soft = (log_probabilities + noise).softmax(-1)[..., KEEP]
    hard = (soft >= 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # 0 or 1 to the bit


def with_likeliest(kept: Tensor, before: Tensor, log_probabilities: Tensor) -> Tensor:
    """What is kept, with the likeliest of the patches that were there `before` where nothing is, (B, N) all."""
    scores = log_probabilities.detach()[..., KEEP].masked_fill(before == 0, -torch.inf)
    likeliest = torch.arange(kept.shape[1], device=kept.device) == scores.argmax(1, keepdim=True)
    return kept + (likeliest & (kept.sum(1, keepdim=True) == 0)).to(kept.dtype)


def ratio_loss(kept: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of each image's kept share from its target (equation 9).

    Args:
        kept: 0 or 1, (B, S, N).
        targets: (S,).
    """
    return (kept.mean(-1) - targets).square().mean()


def kl_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher, student) of predictions, mean over images (equation 8); logits (B, classes)."""
    student, taught = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(student, taught, log_target=True, reduction="batchmean")


def patch_loss(patches: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """KL(teacher, student) of what the kept patches are classified as, a mean over a batch, for backbones that do so.

    Args:
        patches: Logits, (B, N, classes).
        teacher: Logits, (B, N, classes).
        kept: 0 or 1, (B, N); no gradient flows into it.
    """
    kept = kept.detach()
    student, taught = patches.float().log_softmax(-1), teacher.float().log_softmax(-1)
    distances = F.kl_div(student, taught, log_target=True, reduction="none").sum(-1)
    return (distances * kept).sum() / kept.sum().clamp(min=1)


def token_loss(patches: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Mean squared distance of kept patches from the teacher's, over a batch and all features (equation 7).

    Args:
        patches: (B, N, D).
        teacher: (B, N, D).
        kept: 0 or 1, (B, N); no gradient flows into it.
    """
    kept = kept.detach()
    distances = (patches.float() - teacher.float()).square().mean(-1)
    return (distances * kept).sum() / kept.sum().clamp(min=1)

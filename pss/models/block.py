"""The transformer block."""

from typing import Any

from torch import Tensor, nn

from pss.attention.attend import Attention


class Block(nn.Module):
    """One pre-norm transformer block, made of the parts of timm's, that hands extra arguments on to its attention."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1: nn.Module = source.norm1
        self.attn = Attention(source.attn)
        self.ls1: nn.Module = source.ls1
        self.drop_path1: nn.Module = source.drop_path1
        self.norm2: nn.Module = source.norm2
        self.mlp: nn.Module = source.mlp
        self.ls2: nn.Module = source.ls2
        self.drop_path2: nn.Module = source.drop_path2
        self.residual_divisor = 1.0
        """What each branch is divided by before it is added (LV-ViT's residual scaling)."""

    def forward(self, x: Tensor, positions: Tensor | None = None, **attention_options: Any) -> Any:
        """Tokens (B, K, D) to tokens (B, K, D).

        `positions` are those of the model; `attention_options` go to the attention: `attn_mask`, or what a method's own
        attention module takes. An attention module that returns a pair has its second part handed on: the block then
        returns a pair, too.
        """
        branch, extra = self._attend(x, positions, **attention_options)
        x = self._add(x, branch)
        x = self._add(x, self.mlp_branch(x))
        return x if extra is None else (x, extra)

    def attention_branch(self, x: Tensor, positions: Tensor | None = None, **attention_options: Any) -> Tensor:
        """What attention adds to the tokens (B, K, D), before it is divided."""
        return self._attend(x, positions, **attention_options)[0]

    def _attend(self, x: Tensor, positions: Tensor | None, **attention_options: Any) -> tuple[Tensor, Any]:
        attended = self.attn(self.norm1(x), positions, **attention_options)
        attended, extra = attended if isinstance(attended, tuple) else (attended, None)
        return self.drop_path1(self.ls1(attended)), extra

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + (branch if self.residual_divisor == 1.0 else branch / self.residual_divisor)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """What the MLP adds to the tokens (B, K, D), before it is divided."""
        branch: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return branch

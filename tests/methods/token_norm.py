"""A layer whose statistics run, for tests of what a frozen backbone leaves alone."""

from torch import nn


class TokenNorm(nn.Module):
    """A backbone with running statistics, as LV-ViT's stem has them."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, tokens):
        return self.norm(tokens.flatten(0, 1)).view_as(tokens)

"""S²ViTE: a Vision Transformer trained from scratch with a part of its heads and neurons, which change as it learns.

What is left out can be taken out: the trained model is a dense one with fewer heads and narrower MLPs. With a token
selector it is S²ViTE+. Chen et al., NeurIPS 2021, https://arxiv.org/abs/2106.04533
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.settings import Always, Share
from pss.methods.contract import Method
from pss.methods.parts.structure import ScoredAttention, check_blocks, fold_values, head_rows, owned
from pss.methods.parts.topology import Masks, draw_like, hide, kept, move, put, random_mask
from pss.methods.svite import Deployed, SparseTraining, TopologySettings
from pss.methods.vocabulary import Phase, Point, Progress, Step
from pss.models.block import Block, prune
from pss.models.flops import attention_macs
from pss.models.sampling import step_generator
from pss.models.vit import VisionTransformer
from pss.runtime.processes import mean, share
from pss.runtime.shards import own_part, whole
from pss.sections import RunSettings


@dataclass(frozen=True, kw_only=True)
class S2ViTESettings(TopologySettings, section="s2vite"):
    """Sparsity of heads and neurons; the defaults are those published as 40 %."""

    head_density: Always[Share] = 0.7
    """Share of each block's heads that are there, rounded down; one at least."""
    mlp_density: Always[Share] = 0.6
    """Share of each block's neurons that are there, rounded down."""
    reference: Always[bool] = False
    """What the authors' code does where it is wrong; docs/rivals.md says what."""

    @property
    def sparse(self) -> bool:
        return self.head_density < 1 or self.mlp_density < 1


class S2ViTE(SparseTraining):
    """Heads and neurons are masked, as many in every block."""

    name = "s2vite"
    sections = (S2ViTESettings,)

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        own = config.section_of(S2ViTESettings)
        check_blocks(model, self.name)
        super().__init__(model, config, steps_per_epoch, own, own.reference)
        self.own = own
        masks: dict[str, Tensor] = {}
        self.num_heads: list[int] = []
        """Heads of each block that are there."""
        self.num_neurons: list[int] = []
        for number, block in enumerate(self.blocks):
            block.attn = ScoredAttention(block.attn)
            sizes = block.attn.num_heads, self.hidden(block).shape[0]
            counts = kept(own.head_density, sizes[0]), kept(own.mlp_density, sizes[1])
            self.num_heads.append(counts[0])
            self.num_neurons.append(counts[1])
            generator = step_generator(config.train.seed, -1, number)
            for name, size, count in zip(("heads", "neurons"), sizes, counts, strict=True):
                drawn = random_mask((size,), count, generator)
                masks[f"blocks.{number}.{name}"] = drawn.to(self.hidden(block).device)
        self.masks = Masks(masks)
        # They are the same on all processes; DDP would send them round at every step.
        self._ddp_params_and_buffers_to_ignore = [f"masks.{name}" for name in masks]
        self._promise: list[Tensor] = []
        self._scoring = False
        self._known: dict[str, float] = {}

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.model.blocks if isinstance(block, Block)]

    @staticmethod
    def hidden(block: Block) -> nn.Parameter:
        """The MLP's first matrix, a row for each neuron."""
        return block.mlp.get_parameter("fc1.weight")

    def masks_of(self, number: int) -> tuple[Tensor, Tensor]:
        """Heads (H,) and neurons (M,) of a block that are there, bool."""
        place = f"blocks.{number}"
        return self.masks.get_buffer(f"{place}.heads"), self.masks.get_buffer(f"{place}.neurons")

    def masked(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters and their masks, broadcastable."""
        for number, block in enumerate(self.blocks):
            yield from owned(block, *self.masks_of(number), biases=not self.reference)

    @torch.no_grad()
    def apply_masks(self) -> None:
        for parameter, mask in self.masked():
            hide(parameter, mask)

    # A training step.

    def begin_phase(self, phase: Phase) -> None:
        self.apply_masks()  # whatever weights training starts from

    def begin_step(self, at: Progress) -> None:
        """In the steps after which masks move, heads are scored, and neurons that are not there get the weights that
        they would begin with: as they are not read, nothing changes but the gradient of what would read them."""
        self._scoring = self.moves(at)
        for number, block in enumerate(self.blocks):
            attn = block.attn
            assert isinstance(attn, ScoredAttention)
            device = own_part(attn.qkv.weight).device
            attn.scores = torch.zeros(2, attn.num_heads, device=device) if self._scoring else None
            if self._scoring and not self.reference:
                self._begin_neurons(block, ~self.masks_of(number)[1], at, number)

    def _through(self, tokens: Tensor, places: Tensor | None, at: Progress) -> Tensor:
        if self._scoring:  # which no compiled graph does
            return self.model.trunk(tokens, places)
        return super()._through(tokens, places, at)

    @torch.no_grad()
    def _begin_neurons(self, block: Block, where: Tensor, at: Progress, number: int) -> None:
        weight = self.hidden(block)
        generator = self._generator(at, 2 * number, weight)
        put(weight, where[:, None], draw_like(weight, generator))

    @torch.no_grad()
    def _begin_heads(self, block: Block, where: Tensor, at: Progress, number: int) -> None:
        """Queries and keys of grown heads begin as a new model's; their values are zero, and change nothing yet."""
        weight = block.attn.qkv.weight
        rows = head_rows(where, block.attn.head_dim)
        rows[len(rows) // 3 * 2 :] = False
        put(weight, rows[:, None], draw_like(weight, self._generator(at, 2 * number + 1, weight)))

    def _generator(self, at: Progress, number: int, weight: Tensor) -> torch.Generator:
        return step_generator(at.seed, at.step, -1 - number, own_part(weight).device)  # ranks of nobody

    def mask_gradients(self, at: Progress) -> None:
        if self._scoring:
            self._promise = [self._promise_of(block) for block in self.blocks]
        if not self.reference:  # else AdamW's averages of hidden weights go on
            for parameter, mask in self.masked():
                if parameter.grad is not None:
                    hide(parameter.grad, mask)

    def _promise_of(self, block: Block) -> Tensor:
        """What speaks for growing each neuron of a block, (M,): gradients of the weights that would read it."""
        rows, columns = (block.mlp.get_parameter(f"{name}.weight").grad for name in ("fc1", "fc2"))
        assert rows is not None
        assert columns is not None
        by_column = whole(columns).abs().sum(0)
        return by_column + whole(rows).abs().sum(1) if self.reference else by_column

    def after_optimizer(self, at: Progress, step: Step) -> None:
        self.apply_masks()

    def after_average(self, at: Progress) -> None:
        if not self.reference:
            self.apply_masks()

    @torch.no_grad()
    def end_step(self, at: Progress, step: Step) -> None:
        """Move the masks, unless the step was skipped."""
        if not self._scoring:
            return
        if step.taken:
            scores = [block.attn.scores for block in self.blocks if isinstance(block.attn, ScoredAttention)]
            together = mean(torch.cat([one for one in scores if one is not None], dim=1))  # (2, heads of all blocks)
            averaged = torch.split(together, [block.attn.num_heads for block in self.blocks], dim=1)
            for number, block in enumerate(self.blocks):
                self._move(number, block, averaged[number], at, step)
            self.apply_masks()
        self._scoring, self._promise = False, []
        for block in self.blocks:
            if isinstance(block.attn, ScoredAttention):
                block.attn.scores = None

    def _move(self, number: int, block: Block, scores: Tensor, at: Progress, step: Step) -> None:
        heads, neurons = self.masks_of(number)
        part = self.updates.share(at.step + 1)
        active = self.num_heads[number]
        moved_heads = active < len(heads)
        count = math.ceil(part * active) if self.reference else round(part * active)
        heads_moved = move(heads, scores[0], scores[1], count if moved_heads else 0)
        weights = [whole(block.mlp.get_parameter(f"{name}.weight").detach()).abs() for name in ("fc1", "fc2")]
        strength = weights[0].sum(1) + weights[1].sum(0)
        active = self.num_neurons[number]
        count = min(math.ceil(part * active), len(neurons) - active)
        neurons_moved = move(neurons, strength, self._promise[number], count, regrow=self.reference)
        for mask, moved in ((heads, heads_moved), (neurons, neurons_moved)):
            mask.copy_(moved.mask)
            share(mask)
        if self.reference:
            return
        self._begin_heads(block, heads_moved.grown, at, number)
        self._begin_neurons(block, neurons_moved.grown, at, number)
        for parameter, touched in owned(block, heads_moved.touched, neurons_moved.touched):
            step.reset_moments(parameter, touched.expand(parameter.shape))

    # What it costs.

    def sparsity(self) -> str:
        block = self.blocks[0]
        total = block.attn.num_heads, self.hidden(block).shape[0]
        return f"{self.num_heads[0]} of {total[0]} heads and {self.num_neurons[0]:,} of {total[1]:,} neurons a block"

    def published_macs(self, point: Point = None) -> int:
        """Multiply-accumulates of a prediction as the paper counts them: of heads that are left out only queries, keys
        and values cost nothing, neither both products of attention nor the projection."""
        at = self.points()[0] if point is None else point
        macs = self.cost(at).forward
        for number, (block, tokens) in enumerate(zip(self.blocks, self.tokens(at), strict=True)):
            heads = 1 - self.num_heads[number] / block.attn.num_heads
            neurons = 1 - self.num_neurons[number] / self.hidden(block).shape[0]
            macs -= round(tokens * heads * block.attn.qkv.weight.numel())
            macs -= round(tokens * neurons * 2 * self.hidden(block).numel())
        return macs

    def removed_macs(self, point: Point = None) -> int:
        """Multiply-accumulates of the model that is deployed."""
        at = self.points()[0] if point is None else point
        macs = self.published_macs(at)
        for number, (block, tokens) in enumerate(zip(self.blocks, self.tokens(at), strict=True)):
            attn = block.attn
            gone = attn.num_heads - self.num_heads[number]
            macs -= attention_macs(tokens, tokens, gone * attn.product_width)
            macs -= tokens * gone * attn.head_dim * attn.proj.weight.shape[0]
        return macs

    def num_active(self) -> int:
        """Parameters of the model that is deployed."""
        active = sum(part.numel() for part in self.parameters())
        for number, block in enumerate(self.blocks):
            attn, (heads, neurons) = block.attn, self.masks_of(number)
            of_heads = [attn.qkv.weight, attn.qkv.bias, attn.q_bias, attn.v_bias, attn.proj.weight]
            of_heads += [attn.relative_position_bias_table, attn.separable_relative_position_bias_table]
            of_neurons = [self.hidden(block), block.mlp.get_parameter("fc2.weight")]
            of_neurons += [part for name, part in block.mlp.named_parameters() if name == "fc1.bias"]
            for parts, total, left in (
                (of_heads, len(heads), self.num_heads[number]),
                (of_neurons, len(neurons), self.num_neurons[number]),
            ):
                active -= sum(part.numel() for part in parts if part is not None) // total * (total - left)
        return active

    def facts(self) -> dict[str, float]:
        """Of the deployed model: `active_params`, `deployed_gflops` at the first operating point, and
        `published_gflops`, as the paper counts them."""
        return self._known or {
            "active_params": float(self.num_active()),
            "deployed_gflops": self.removed_macs() / 1e9,
            "published_gflops": self.published_macs() / 1e9,
        }

    # What the trained model can do.

    def deployed(self) -> Method:
        """A dense model without the heads and neurons that are masked."""
        masks = [self.masks_of(number) for number in range(len(self.blocks))]
        small = copy.deepcopy(self)
        for block, (heads, _) in zip(small.blocks, masks, strict=True):
            if self.reference:
                fold_values(block, heads)
        left = [(heads.nonzero().squeeze(1), neurons.nonzero().squeeze(1)) for heads, neurons in masks]
        prune(small.model, left)
        if self.selector is None:
            return Deployed(small.model, self.config, self.steps_per_epoch, self.facts())
        small.masks, small._known = Masks({}), self.facts()
        return small

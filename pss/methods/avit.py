"""Tokens that halt on their own: each leaves once the scores that it has collected over the blocks reach 1 (A-ViT).

Yin, Vahdat, Alvarez, Mallya, Kautz & Molchanov (2022), *A-ViT: Adaptive Tokens for Efficient Vision Transformer*; the
halting rule is that of Graves (2016). A score is the sigmoid of one channel of the token, so there are no parameters
beside the model's. The classifier reads the average of what the blocks returned for a token, weighted by its scores.

Training masks tokens that have halted (`AViT.masked`); inference takes them out, and computes the same of what is left
(`AViT._packed`). `docs/rivals.md` has the settings, and where they differ from the published code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from pipelines.settings import AboveZero, Always, NotNegative, ReadIf, Share
from pss.attention.attend import Attention
from pss.attention.packed import PackedAttention, Packing
from pss.methods.contract import Method
from pss.methods.parts.halting import Halting, Record, center_of, prior_loss
from pss.methods.vocabulary import Cost, DenseTargets, Point, Progress, Step
from pss.models.flops import attention_macs, linear_macs, macs_of_tokens
from pss.models.vit import VisionTransformer
from pss.sections import MethodSection, RunSettings

_log = logging.getLogger(__name__)

_HIDDEN = -1000.0
"""Added to the logits of keys that have halted: their weight is 0 to the bit, and an image that has no others stays
finite, as it would not with minus infinity."""

_CENTER = 5.0
"""Until one is found; what few random blocks begin well with."""

_PriorRead = ReadIf(lambda at: at.own.alpha_prior > 0, "avit.alpha_prior above 0")


@dataclass(frozen=True, kw_only=True)
class AvitSettings(MethodSection, section="avit"):
    """When a token halts, and what training makes of it."""

    gate_scale: Always[AboveZero] = 10.0
    """Factor γ of the channel that scores are read from."""
    gate_center: Always[Annotated[float, Ge(-1e30), Le(1e30)] | None] = None
    """What is subtracted then, -β. It belongs to the weights that a run starts from: None finds one on the run's first
    images, at which tokens go through `initial_depth` of the blocks before anything is trained."""
    initial_depth: Annotated[Share, ReadIf(lambda at: at.own.gate_center is None, "avit.gate_center=none")] = 0.95
    """Share of the blocks that tokens go through at first, where the gate's centre is found."""
    alpha_ponder: Always[NotNegative] = 5e-4
    """Weight of the ponder loss: blocks and remainder of a token, on average."""
    alpha_prior: Always[NotNegative] = 1e-3
    """Weight of the loss that wants the scores' mean profile over the blocks to be a Gaussian."""
    target_depth: Annotated[AboveZero | None, _PriorRead] = None
    """Its mean, in blocks from 0; None is 8 of 12, and in proportion for other depths."""
    halt_eps: Always[Annotated[float, Gt(0), Lt(1)]] = 0.01
    """A token halts at a sum of 1 less this."""
    reference: Annotated[bool, _PriorRead] = False
    """Take the published form of that loss, whose target and profile are no distributions."""
    early_exit: Always[bool] = True
    """At inference, let an image go as soon as all that the classifier reads has halted. The published code lets its
    patches go on, which changes no answer and costs more."""

    def check_run(self, config: Any) -> None:
        if self.reference and config.train.parallel == "fsdp":
            raise ValueError(
                "avit.reference takes blocks apart, which shards cannot be; set train.parallel=ddp, or leave it out"
            )


class AViT(Method):
    """Tokens leave on their own; what an image costs depends on it."""

    name = "avit"
    sections = (AvitSettings,)
    costs_vary = True

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.own = config.section_of(AvitSettings)
        num_blocks, prefix = len(model.blocks), model.num_prefix_tokens
        self.target_depth = self.own.target_depth or num_blocks * 8 / 12
        if self.target_depth >= num_blocks:
            known = f"the model's {num_blocks} blocks are numbered from 0; set a lower one, or leave it out"
            raise ValueError(f"avit.target_depth is {self.target_depth:g}, and {known}")
        usual = type(model).readout is VisionTransformer.readout and type(model).pooled is VisionTransformer.pooled
        # Which tokens the classifier reads; outputs are averaged of the first ones, up to the last that is read.
        if usual and (model.head_dist is not None or model.global_pool == "token"):
            self.reads = slice(0, 1 if model.head_dist is None else 2)
        else:
            self.reads = slice(0 if model.pool_include_prefix or not usual else prefix, model.num_tokens)
        self.rows = self.reads.stop
        # One that a backbone brings along may mean something else by the same tokens.
        self.packs = all(type(block.attn) is Attention for block in model.blocks)
        for block in model.blocks if self.packs else ():
            block.attn = PackedAttention(block.attn)
        self.gate_center: Tensor
        self.register_buffer(
            "gate_center", torch.tensor(_CENTER if self.own.gate_center is None else self.own.gate_center)
        )
        self.depth_sums: Tensor  # of the epoch's steps so far: shares of the blocks, steps
        self.register_buffer("depth_sums", torch.zeros(2))

    # Training

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        model, own = self.model, self.own
        tokens, places = model.see(images, 1.0, low_resolution=True)
        record: Record = model.compute(self.masked, tokens, places)
        logits = model.readout(model.norm(record.out))
        ponder, depth = record.ponder.mean(), record.blocks.mean() / len(model.blocks)
        loss = self.classification_loss(logits, targets) + own.alpha_ponder * ponder
        result = {"logits": logits, "ponder": ponder, "depth": depth}
        if own.alpha_prior > 0:
            scores = record.scores[:, :, model.num_prefix_tokens :]
            result["prior"] = prior_loss(scores, self.target_depth, reference=own.reference)
            loss = loss + own.alpha_prior * result["prior"]
        if self.training:
            self.depth_sums += torch.stack((depth, torch.ones_like(depth)))
        return {"loss": loss, **result}

    def masked(self, tokens: Tensor, places: Tensor | None = None, maps: dict[int, Any] | None = None) -> Record:
        """The blocks on all tokens (B, N, D), with those that have halted hidden from the others.

        `places` are those of `VisionTransformer.see`; `maps` is given the attention weights of the blocks that it has.
        """
        positions = self.model.positions(places)
        state = Halting.begin(tokens.shape[:2], tokens.device)
        out: Tensor | float = 0.0
        scores, weights = [], []
        for number, block in enumerate(cast(Any, self.model.blocks)):
            mask = _HIDDEN * (1 - state.active)[:, None, None] if number else None  # (B, 1, 1, N)
            if number:  # as keys they are hidden; this keeps what they have become out of everything else
                tokens = tokens * state.active[..., None]
            if maps is not None and number in maps:
                q, k, _ = block.attn.project_in(block.norm1(tokens), positions)
                logits = block.attn.logits(q, k, positions)
                maps[number] = (logits if mask is None else logits + mask).softmax(dim=-1)
            if self.own.reference and mask is not None:
                tokens = self._apart(block, tokens, state.active[..., None], positions, mask)
            else:
                tokens = self.model.run_blocks(tokens, positions, number, number + 1, attn_mask=mask)
            score = self._scores(tokens)
            scores.append(score if self.own.reference else score * state.active)
            state, weight = self._after(state, score, number)
            weights.append(weight)
            out = out + weight[:, : self.rows, None] * tokens[:, : self.rows]
        assert isinstance(out, Tensor)
        return Record(out, torch.stack(scores, 1), torch.stack(weights, 1), state.ponder, state.blocks)

    def _scores(self, tokens: Tensor) -> Tensor:
        return (self.own.gate_scale * tokens[..., 0].float() - self.gate_center).sigmoid()

    def _after(self, state: Halting, scores: Tensor, number: int) -> tuple[Halting, Tensor]:
        return state.after(scores, last=number == len(self.model.blocks) - 1, eps=self.own.halt_eps)

    def _apart(self, block: Any, x: Tensor, active: Tensor, positions: Tensor | None, mask: Tensor) -> Any:
        """A block as the published code computes it for tokens that have halted.

        What enters attention and MLP is zero for them, and what those return stays until the next block: the published
        prior loss reads scores from it.
        """

        def compute(x: Tensor, active: Tensor) -> Any:
            branch = block.attn(active * block.norm1(x), positions, attn_mask=mask)
            x = x + block.drop_path1(block.ls1(branch)) / block.residual_divisor
            branch = block.mlp(active * block.norm2(active * x))
            return x + block.drop_path2(block.ls2(branch)) / block.residual_divisor

        again = self.model.checkpoint_activations and torch.is_grad_enabled()
        return checkpoint(compute, x, active, use_reentrant=False) if again else compute(x, active)

    def begin_run(self, images: Tensor) -> None:
        if self.own.gate_center is None:
            training = self.training
            self.eval()
            tokens, places = self.model.see(images, 1.0, low_resolution=True)
            channels = self._channels(tokens, self.model.positions(places))
            self.gate_center.fill_(center_of(channels, self.own.initial_depth, self.own.halt_eps))
            self.train(training)

    @torch.no_grad()
    def _channels(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """What the gate's centre is subtracted from, block by block where none halts, (L, B, N)."""
        found = []
        for number in range(len(self.model.blocks)):
            tokens = self.model.run_blocks(tokens, positions, number, number + 1)
            found.append(self.own.gate_scale * tokens[..., 0].float())
        return torch.stack(found)

    def begin_epoch(self, at: Progress) -> None:
        if at.step % self.steps_per_epoch == 0:  # else an epoch goes on that was interrupted
            self.depth_sums.zero_()

    def end_step(self, at: Progress, step: Step) -> None:
        if at.step == 0 and at.rank == 0 and step.taken:
            share = self.facts().get("train_depth", 1.0)
            if share < 0.8:
                _log.warning(
                    f"tokens halt after {share:.0%} of the blocks in the first step already: raise avit.gate_center, "
                    f"which is {self.gate_center:g}, or set avit.gate_center=none, which finds one for these weights"
                )

    def facts(self) -> dict[str, float]:
        """`train_depth`: the mean share of the blocks that tokens went through in the last epoch's steps."""
        total, steps = self.depth_sums.tolist()
        return {"train_depth": total / steps} if steps else {}

    # What the trained model can do

    def points(self) -> tuple[Point, ...]:
        return (None,)

    def predict(self, images: Tensor, point: Point = None) -> Tensor:
        return self._run(images)[0]

    def predict_with_cost(self, images: Tensor, point: Point = None) -> tuple[Tensor, Tensor]:
        logits, depths = self._run(images)
        return logits, self.macs_of(depths)

    def macs_of(self, depths: Tensor) -> Tensor:
        """Multiply-accumulates of images whose tokens, prefix included, went through so many blocks, (B, N) to (B,)."""
        model = self.model
        fixed = float(model.stem_macs(model.num_patches) + model.readout_macs(model.num_tokens))
        total = torch.full(depths.shape[:1], fixed, dtype=torch.float64, device=depths.device)
        for number, block in enumerate(cast(Any, model.blocks)):
            count = (depths > number).sum(1, dtype=torch.float64)
            width = block.attn.num_heads * block.attn.product_width
            total += linear_macs(block, 1) * count + attention_macs(1, 1, width) * count**2
        return total

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and how many blocks each token went through, int64 (B, N)."""
        tokens = self.model.embed(images)
        # Processes that share a model run its blocks together, whatever is left to do on each.
        if self.packs and not isinstance(self.model.blocks[0], FSDPModule):
            out, depths = self._packed(tokens)
        else:
            record = self.masked(tokens)
            out, depths = record.out, record.blocks.long()
            if self.own.early_exit:
                depths = depths.minimum(depths[:, self.reads].amax(1, keepdim=True))
        return self.model.readout(self.model.norm(out)), depths

    def _packed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What `masked` returns as `out` and `blocks`, from the blocks on those tokens alone that have not halted.

        Tokens (B, N, D) are a sequence of all images' tokens here, in order, which gets shorter.
        """
        model, (num_images, num_tokens, width) = self.model, tokens.shape
        everywhere = model.positions(None)
        x, device = tokens.flatten(0, 1), tokens.device  # (T, D)
        total, rest = torch.zeros(len(x), device=device), torch.ones(len(x), device=device)  # as of `Halting`
        image = torch.arange(num_images, device=device).repeat_interleave(num_tokens)
        token = torch.arange(num_tokens, device=device).repeat(num_images)
        depths = torch.full((num_images, num_tokens), len(model.blocks), device=device)
        out = x.new_zeros((num_images, self.rows, width), dtype=torch.promote_types(x.dtype, torch.float32))
        shape, positions, packing = (num_images, num_tokens), everywhere, None  # of x, in blocks
        read: Tensor | None = None
        for number, block in enumerate(model.blocks):
            options: dict[str, Any] = {} if packing is None else {"packing": packing}
            x = block(x.view(*shape, width), positions, **options).flatten(0, 1)
            last = number == len(model.blocks) - 1
            score = self._scores(x)
            total = total + score
            stops = torch.ones_like(total, dtype=torch.bool) if last else total >= 1 - self.own.halt_eps
            stopping = last or bool(stops.any())
            weight = torch.where(stops, rest, score) if stopping else score
            rest = rest - score
            if read is None:
                first = x.view(num_images, num_tokens, width)[:, : self.rows].to(out.dtype)
                out.addcmul_(first, weight.view(num_images, num_tokens, 1)[:, : self.rows])
            else:  # each row comes once: the order of the additions is no matter
                place = image[read] * self.rows + token[read]
                out.view(-1, width).index_add_(0, place, (weight[read, None] * x[read]).to(out.dtype))
            if last or not stopping:
                continue
            goes = ~stops
            if self.own.early_exit:
                needed = torch.zeros(num_images, dtype=torch.bool, device=device)
                needed[image[goes & (token >= self.reads.start) & (token < self.reads.stop)]] = True
                goes = goes & needed[image]
            depths[image[~goes], token[~goes]] = number + 1
            left = goes.nonzero().squeeze(1)
            if not len(left):
                break
            x, total, rest, image, token = (part[left] for part in (x, total, rest, image, token))
            read = (token < self.rows).nonzero().squeeze(1)
            lengths = [count for count in image.bincount().tolist() if count]
            even = len(set(lengths)) == 1
            shape = (len(lengths), lengths[0]) if even else (1, len(x))
            packing = None if even else Packing.of(lengths, device)
            if everywhere is not None:
                where = token.view(shape)
                positions = everywhere[:, 0, where] if model.rope is None else everywhere[0, where]
        return out, depths

    def tokens(self, point: Point = None) -> tuple[int, ...]:
        return (self.model.num_tokens,) * len(self.model.blocks)

    def cost(self, point: Point = None) -> Cost:
        return Cost(macs_of_tokens(self.model, self.tokens()))

    def depths(self, images: Tensor, point: Point = None) -> Tensor:
        return self._run(images)[1][:, self.model.num_prefix_tokens :]

    def attention_maps(self, images: Tensor, point: Point = None, blocks: Sequence[int] | None = None) -> list[Tensor]:
        """Tokens that have halted look at others still, and are not looked at."""
        maps: dict[int, Any] = dict.fromkeys(range(len(self.model.blocks)) if blocks is None else blocks)
        self.masked(self.model.embed(images), maps=maps)
        return list(maps.values())

    def export_module(self, point: Point) -> nn.Module:
        return _Masked(self)


class _Masked(nn.Module):
    """The masked forward pass, whose shapes do not depend on the images."""

    def __init__(self, method: AViT) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        model = self.method.model
        record = self.method.masked(model.embed(images))
        return model.readout(model.norm(record.out))

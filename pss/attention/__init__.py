"""Attention over any kept part of a sequence. `attend` alone chooses an implementation: plain operations, a bias looked
up into a buffer (`materialised`, `cpu`), or inside a Triton kernel (`fused`, `kernels`). `relpos` is the arithmetic
of relative positions that they share.
"""

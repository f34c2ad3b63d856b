"""Benchmarks, one module each: `python -m tools.benchmarks.NAME`. They interleave what they compare, and quote ratios
of medians with their spread.
"""

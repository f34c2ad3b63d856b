"""What large data sets cost on one machine, `python -m tools.benchmarks.scale`. What is measured runs in processes of
its own, which import nothing else, so that their memory is theirs.
"""

"""Data sets of any size on any number of nodes: what the order of samples costs, and what nodes ask of a store; worked
out, not measured."""

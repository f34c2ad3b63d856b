"""Large data sets, on one machine and on many: what they cost, what their order costs, and what nodes ask of a store.

What is measured runs in processes of its own, which import nothing else, so that their memory is theirs.
"""

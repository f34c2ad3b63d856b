"""What a run will cost, before it is trained: worked out from its settings (`plan`), or measured on the machine at hand
(`doctor`).
"""

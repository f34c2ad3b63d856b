"""Vision Transformers that take any share of their patches, composed from timm's parts. `vit` is the model and
`sampling` the choice of patches. What a forward pass costs, how weights are read and how blocks are compiled stand
beside them.
"""

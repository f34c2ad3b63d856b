"""From listed samples to indexed tars and `.beton` files. `convert` is the whole of it. Work is divided into pieces
that survive an interruption, and `verify` checks what was written.
"""

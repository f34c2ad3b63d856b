"""The three commands: `pss-convert`, `pss-train` and `pss-eval`, each one Typer app. They read arguments and print; the
work is done elsewhere.
"""

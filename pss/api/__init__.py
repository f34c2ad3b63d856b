"""What the commands do, as functions for scripts and notebooks: `pss.train`, `pss.evaluate` and `pss.convert`. They
return what was found, with tables and pictures; the commands print it.
"""

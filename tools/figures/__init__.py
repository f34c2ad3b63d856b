"""The figures and tables of the papers in kind, from small runs: one module for each paper."""

"""Pictures in kind of the figures and tables of papers, one module for each group: same axes and columns, from small
runs of this code, each with its command, its number of runs and their spread.
"""

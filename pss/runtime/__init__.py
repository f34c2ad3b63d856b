"""The machine a run is on: its processes, the threads of a CPU, and the precision of the arithmetic. Nothing here knows
models or data.
"""

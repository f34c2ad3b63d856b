"""A run, from its first step to its last checkpoint. Begin reading at `trainer`. Nothing here knows a method or a
loader by name.
"""

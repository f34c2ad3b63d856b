"""Names and samples by the million. They are kept as buffers and arrays, at a few bytes each, and made into Python
objects one at a time, when somebody asks for one.
"""

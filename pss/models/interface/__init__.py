"""A model as other programs know it: timm's interface of a backbone, and what a file that somebody else wrote may ask a
model to be built with. Nothing in here knows how a model computes.
"""

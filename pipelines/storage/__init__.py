"""A data set on the disk, as conversion writes it and loaders read it: the manifest with its checksums, random access
to encoded images and to label maps, and the words for what cannot be read.
"""

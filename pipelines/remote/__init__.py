"""Data sets that lie in an object store or behind HTTP: an order that a bounded cache can serve, the cache of a node,
shared by its processes, and the tars in it."""

"""How large what is asked for may be. What is over a limit is refused in a sentence, before it takes time or memory."""

FILE = 2**18
"""Bytes of an experiment file; those of `configs/` have a few thousand."""

NESTING = 32
"""Lists and mappings of an experiment, one inside the other."""

VALUES = 50_000
"""Values of an experiment, with aliases and merges written out."""

TEXT = 4096
"""Characters of a text of an experiment: as long as a path may be."""

WHOLE = 2**63
"""A whole number, either way; more than 63 bits are none."""

POINTS = 10_000
"""Nodes that the lists of an experiment stand for."""

WRITTEN = 500_000
"""Values of an experiment whose lists are written out, node by node."""

DEPTH = 200
"""Nodes that are made from each other, the one from the next."""

ATTACKS = 1000
"""Attacks that the lists of one evaluation stand for."""

NAME = 64
"""Characters of a name, with what `leakage` adds to it, and of a split's."""

PLACE = 128
"""Characters of a node's place in a sweep, which stands after its name. Both make a folder's name, at most 255."""

CLASSES = 100_000
"""Classes of a dataset or a model; ImageNet-21k has 21,843."""

IMAGES = 2**24
"""Images of a split that are made, not loaded."""

SHARDS = 100_000
"""Shards of a dataset, and tars that a pattern with braces stands for."""

SIDE = 4096
"""Pixels along a side of an image that is made, resized or cropped."""

STEPS = 100_000
"""Steps of a search, tries of it, points of its grid, epochs of a training."""

MEMORY = 2**33
"""Bytes of the pixels of a shard, and of a batch as float32: what one worker holds of them."""

PADDING = 256
"""Images that a batch may be padded to where a shard has fewer."""

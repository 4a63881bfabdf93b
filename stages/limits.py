"""Limits on requests. A request beyond one is refused with an error before it costs time or memory."""

FILE = 2**18
"""Bytes of an experiment file; those in `configs/` have a few thousand."""

TEXT_KEPT = 60_000
"""Characters of an experiment file up to which a run's record keeps its text."""

NESTING = 32
"""Nesting depth of lists and mappings in an experiment."""

VALUES = 50_000
"""Values in an experiment, with aliases and merge keys expanded."""

TEXT = 4096
"""Characters in a string, as in a path."""

WHOLE = 2**63
"""Absolute value of an integer: 63 bits."""

POINTS = 10_000
"""Nodes in an expanded sweep."""

WRITTEN = 500_000
"""Values in an expanded sweep, over all nodes."""

DEPTH = 200
"""Length of a chain of nodes, each made from the one before."""

ATTACKS = 1000
"""Attacks of one evaluation, with its lists expanded."""

NAME = 64
"""Characters in the name of a node, including suffixes from `leakage`, or of a split."""

PLACE = 128
"""Characters in a node's sweep suffix. Name and suffix form a folder name, which has at most 255."""

CLASSES = 100_000
"""Classes of a dataset or a model; ImageNet-21k has 21,843."""

CONFUSED = 100
"""Classes of an evaluation that counts confusions: the square of it are the numbers in each mark."""

IMAGES = 2**24
"""Images in a split of a synthetic dataset."""

SHARDS = 100_000
"""Shards of a dataset, and tars matched by a brace pattern."""

SIDE = 1024
"""Pixels per side of a synthetic, resized or cropped image: a network's trial pass on two images takes a GiB."""

STEPS = 100_000
"""Steps of an attack, random tries, points of a grid, epochs of a training."""

MEMORY = 2**33
"""Bytes of a shard's pixels, and of a batch in float32, in one worker."""

PADDING = 256
"""Images in a batch when the shard is smaller: the batch is padded."""

"""What happens to the data: load, attack, relabel, shard, train, evaluate.

Plain functions over arrays, bytes and paths, each told by a frozen recipe what to do. Nothing in here
knows of Ray, of the store or of the command line: a stage can be called from a notebook.
"""

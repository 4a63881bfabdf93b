"""The first steps: what lies in a folder, an experiment for it, shards of it, and whether this machine is ready."""

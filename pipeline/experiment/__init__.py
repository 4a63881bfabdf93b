"""The experiment file: read, swept over, checked, made a graph."""

"""A run: which nodes exist already, which are made next, by whom; what is kept of it."""

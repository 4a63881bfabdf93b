"""All that there is to prove and to measure on a GPU, in as many minutes as there are: see `__main__`."""

"""Weights that others trained: fetched, read as data, fitted to a network."""

"""The public API of `notbugs`, for notebooks and training scripts."""

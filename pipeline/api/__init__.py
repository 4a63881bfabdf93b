"""The public names of `notbugs`, for notebooks and trainings."""

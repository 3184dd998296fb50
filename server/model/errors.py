"""What can go wrong before there is a model to serve."""


class ModelError(Exception):
    """The model cannot be had; the text says which model, why, and what to do about it."""

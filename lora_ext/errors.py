"""Errors that a caller may want to tell apart."""

__all__ = [
    "AdapterFileError",
    "AlreadyMergedError",
    "NotBuiltError",
    "NotMergedError",
]


class AlreadyMergedError(RuntimeError):
    """merge() on a module whose adapter is in its weight."""


class NotMergedError(RuntimeError):
    """unmerge() on a module whose adapter is not in its weight."""


class NotBuiltError(NotImplementedError):
    """A request for something that is known but not built: refused by name, never ignored."""


class AdapterFileError(ValueError):
    """An adapter's file that cannot be trusted or does not fit; names the file and the key."""

"""What goes wrong, in the user's words."""


class BadInput(ValueError):
    """The request cannot be met as it stands; the message is one sentence for the person who made it.

    Nothing has been written when this is raised, and trying again will not help.
    """


class BadData(RuntimeError):
    """Data that was read is not what it should be (damaged, undecodable, of the wrong shape)."""

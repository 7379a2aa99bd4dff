"""The zoo's one error, in a file that needs no torch: a command that computes nothing starts at once."""


class ZooError(ValueError):
    """Something a user can mend: the message names the value, what was expected, and the remedy, in one line."""

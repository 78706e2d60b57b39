"""What a user got wrong."""


class UserError(ValueError):
    """A mistake the user can mend. The message is one sentence that ends with the remedy."""

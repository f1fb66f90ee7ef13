"""Verify published versions, have servers serve them, go back, and retire them."""


class ReleaseError(RuntimeError):
    """A version or a server failed a check. The previous version keeps serving."""


class RepositoryError(RuntimeError):
    """The repository cannot be used; the message says what to do."""

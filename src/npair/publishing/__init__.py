"""From a checkpoint to a version folder."""


class PublishError(RuntimeError):
    """A network that must not be published. Nothing was written."""

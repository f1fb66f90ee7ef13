"""Networks that turn pixels into an embedding."""


class NetworkError(RuntimeError):
    """A network cannot be built or its weights cannot be loaded; the message says what to do."""

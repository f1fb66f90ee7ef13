"""Networks that turn pixels into an embedding."""

"""From a version folder to servers that serve it."""

"""The vector database behind ``npair index``."""

import os

# LanceDB reads this when imported; its warnings of empty index parts are harmless.
os.environ.setdefault("LANCEDB_LOG", "error")

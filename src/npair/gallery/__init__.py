"""Photos that can be searched: a vector database."""

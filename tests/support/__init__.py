"""What several tests need, beside conftest's fixtures."""

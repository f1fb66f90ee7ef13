"""Vectors in, metrics and pictures out."""

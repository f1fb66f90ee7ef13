"""What serve.py is made of: it starts Triton, watches it, and stops it in order."""

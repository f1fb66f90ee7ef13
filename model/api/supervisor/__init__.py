"""The parts of serve.py: start Triton, watch it, and stop it in order."""

"""Photos and labels: sources, checks, splits and decoded pixels."""

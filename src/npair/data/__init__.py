"""Photos and labels: where they come from, what is wrong with them, their decoded pixels."""

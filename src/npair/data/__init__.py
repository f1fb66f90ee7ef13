"""Photos and labels: where they come from, what is wrong with them, their decoded pixels."""

# For training, whose runs keep its parameters and which may not import serving.
from npair.serving.manifest import Preprocessing

__all__ = ["Preprocessing"]

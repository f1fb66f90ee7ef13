"""Photos and labels: where they come from, what is wrong with them, their decoded pixels."""

from npair.serving.preprocess import Preprocessing

__all__ = ["Preprocessing"]

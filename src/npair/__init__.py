"""npair: image embeddings trained with the multi-class N-pair loss and served by NVIDIA Triton."""

__version__ = "0.2.0"

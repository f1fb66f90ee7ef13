"""model.py of a plain Python backend, written like the public examples: request by request."""

import network
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.model = network.load()

    def execute(self, requests):
        responses = []
        for request in requests:
            photos = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().ravel()
            embeddings = self.model.embed([self.model.decode(photo) for photo in photos])
            responses.append(
                pb_utils.InferenceResponse(
                    [pb_utils.Tensor("EMBEDDING", embeddings.astype(np.float32))]
                )
            )
        return responses

"""MLServer's runtime; start it with: mlserver start FOLDER

The folder's model-settings.json names mlserver_app.Embedding. Requests are V2 in JSON, with photos
in base64.
"""

import base64

import network
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class Embedding(MLModel):
    async def load(self) -> bool:
        self.network = network.load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        photos = [base64.b64decode(photo) for photo in payload.inputs[0].data]
        embeddings = self.network.embed([self.network.decode(photo) for photo in photos])
        output = ResponseOutput(
            name="EMBEDDING",
            shape=list(embeddings.shape),
            datatype="FP32",
            data=embeddings.ravel().tolist(),
        )
        return InferenceResponse(model_name=self.name, outputs=[output])

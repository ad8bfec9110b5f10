"""MLServer: a custom runtime that decodes and encodes with the NumPy codec, as its documentation shows one."""

import torch
from _head import Head
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, NumpyRequestCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Scorer(MLModel):
    """POST /v2/models/head/infer."""

    async def load(self) -> bool:
        self.head = Head()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        features = self.decode_request(payload, default_codec=NumpyRequestCodec)
        output = NumpyCodec.encode_output("SCORES", self.head.scores(torch.from_numpy(features)))
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[output])

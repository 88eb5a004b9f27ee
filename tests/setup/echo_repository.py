"""A model repository with our model names and no engine: the ensemble and deepseek_v3 answer with their prompt.

It lets the launcher be tested against a real tritonserver in seconds. `python_body` replaces what execute does, so that
a test can make the model slow, or fail while it loads.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
instance_group [{{ kind: KIND_MODEL count: 1 }}]
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [1] }},
  {{ name: "max_tokens" data_type: TYPE_INT32 dims: [1] optional: true }}
]
output [{{ name: "text_output" data_type: TYPE_STRING dims: [1] }}]
"""

MODEL = """
import threading, time
import numpy as np
import triton_python_backend_utils as pb_utils


def answer(sender, text, seconds):
    time.sleep(seconds)
    output = pb_utils.Tensor("text_output", np.array([text], dtype=object))
    sender.send(
        pb_utils.InferenceResponse(output_tensors=[output]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    )


class TritonPythonModel:
    def initialize(self, args):
        pb_utils.Logger.log_info("echo: loading")
{initialize}

    def execute(self, requests):
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0]
            seconds = 2.0 if text.startswith(b"slow") else 0.0
            threading.Thread(target=answer, args=(request.get_response_sender(), text, seconds)).start()
        return None
"""


def write_echo_repository(path: Path, initialize: str = "pass") -> Path:
    """The two models; `initialize` is Python that runs while each loads."""
    for name in ("ensemble", "deepseek_v3"):
        (path / name / "1").mkdir(parents=True)
        (path / name / "config.pbtxt").write_text(CONFIG.format(name=name))
        body = textwrap.indent(textwrap.dedent(initialize), " " * 8)
        (path / name / "1" / "model.py").write_text(MODEL.replace("{initialize}", body))
    return path

"""What the README shows works as it stands there, but for the ports."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.triton_server import TritonServer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LIMIT_S = 60.0


def on_ports(text: str, triton: TritonServer) -> str:
    """The text with this server's addresses."""
    return text.replace("localhost:8000", triton.http).replace("localhost:8001", triton.grpc)


def test_the_curl_commands_answer_and_the_second_one_streams(triton: TritonServer) -> None:
    commands = [shlex.split(on_ports(line, triton)) for line in re.findall(r"^curl .*$", README, re.MULTILINE)]
    answers = []
    for _curl, _flags, address, _d, body in commands:
        with urllib.request.urlopen(f"http://{address}", body.encode(), timeout=LIMIT_S) as answer:
            answers.append(answer.read().decode())
    assert len(answers) == 2
    assert '"num_output_tokens":20' in answers[0]
    assert answers[1].count("data: {") > 1


def test_the_python_example_prints_the_answer_and_ends(triton: TritonServer) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    command = [sys.executable, "-c", on_ports(code, triton)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert result.stdout and not result.stderr

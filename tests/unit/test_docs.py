"""The documents say what the code does: request tables, file tree, relative links."""

from __future__ import annotations

import json
import re
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from nmoe_backend.api.app import make_app
from nmoe_backend.api.metrics import ApiMetrics
from nmoe_backend.api.service import Service
from nmoe_backend.contract_inputs import INPUTS
from nmoe_backend.contract_outputs import OUTPUTS
from nmoe_backend.openai_config import OpenAIConfig
from nmoe_backend.supervisor_config import SupervisorConfig

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def table_rows(path: Path) -> dict[str, list[str]]:
    """First cell -> the other cells, for the rows whose first cell is a `name`."""
    rows = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and cells[0].endswith("`"):
            rows[cells[0].strip("`")] = cells[1:]
    return rows


def test_requests_md_lists_every_tensor_with_type_and_default() -> None:
    rows = table_rows(ROOT / "docs" / "requests.md")
    for spec in INPUTS.values():
        assert rows[spec.name][:2] == [f"{spec.dtype} {list(spec.dims)}", spec.default], spec.name
    text = (ROOT / "docs" / "requests.md").read_text()
    for name, (dtype, dims) in OUTPUTS.items():
        kind = f"{dtype} {list(dims)}"
        assert rows[name][0] == kind or f"output `{name}` ({kind})" in text, name
    assert set(rows) == set(INPUTS) | set(OUTPUTS)


def test_openai_md_lists_every_setting_with_its_default() -> None:
    rows = table_rows(ROOT / "docs" / "openai.md")
    default = OpenAIConfig()
    for name in default.__dataclass_fields__:
        value = getattr(default, name)
        if name != "api_keys" and value is not None:
            assert rows[name][0] == json.dumps(value), name


def test_openai_md_lists_every_endpoint() -> None:
    text = (ROOT / "docs" / "openai.md").read_text()
    app = make_app(_no_service, 0, ApiMetrics())
    for path in app.openapi()["paths"]:
        assert f" {path}`" in text, path


def _no_service() -> AbstractAsyncContextManager[Service]:
    raise AssertionError("the document needs no engine")


def test_every_relative_link_and_named_file_exists() -> None:
    named = re.compile(r"`((?:docs|configs|scripts|perf|tests|model_repository|nmoe_backend)/[\w./-]+)`")
    for document in DOCUMENTS:
        for name in named.findall(document.read_text()):
            assert (ROOT / name).exists(), f"{document.name} names {name}"


def test_the_messages_in_the_runbook_are_those_of_the_code() -> None:
    source = "".join(path.read_text() for path in (ROOT / "nmoe_backend").rglob("*.py"))
    rows = [line for line in (ROOT / "docs" / "runbook.md").read_text().splitlines() if line.startswith("| ")]
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(quoted) > 4
    for text in quoted:
        assert text.split(" = ")[0] in source, f"runbook.md quotes {text!r}, which no code says"


def test_every_markdown_document_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.stem in readme, f"README.md does not mention docs/{path.name}"


def test_runbook_md_lists_every_setting_of_the_supervisor_with_its_default() -> None:
    rows = table_rows(ROOT / "docs" / "runbook.md")
    for name, value in SupervisorConfig().as_tree().items():
        assert rows[name][0] == json.dumps(value), name

"""A module imports only from the lines above it: the table of docs/architecture.md, held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nmoe_backend"

# line -> (its modules, the lines that they may import from). A name covers its submodules and its `name_*` neighbours.
LINES: dict[int, tuple[tuple[str, ...], set[int]]] = {
    0: (("types", "environ", "models.spec"), {0}),
    1: (
        (
            *("config", "openai_config", "supervisor_config", "generation", "toml_table", "memory"),
            *("safetensors_header", "findings", "preflight", "step_buckets"),
        ),
        {0, 1},
    ),
    2: (("cache", "step_time"), {0, 1}),
    3: (("scheduler",), {0, 1, 2, 3}),
    4: (("engine", "orchestrator"), {0, 1, 2, 3, 4}),
    5: (
        ("contract", "text", "metrics", "lifecycle", "event_log", "tracing", "responder", "stub", "grammar"),
        {0, 1, 5},
    ),
    6: (("kernels",), set()),
    7: (("parallel",), {0, 1, 6, 7}),
    8: (("layers",), {0, 6, 7, 8}),
    9: (("models", "model"), {0, 1, 8, 9}),
    10: (("runtime", "convert"), {0, 1, 6, 7, 8, 9, 10}),
    11: (("warmup",), set(range(12))),
    12: (
        (
            *("tritonserver", "server_process", "http_probe", "grpc_probe", "doctor", "supervisor", "launch", "top"),
            "bench",
        ),
        {0, 1, 12},
    ),
    13: (("api",), {0, 1, 5, 12, 13}),
}
TORCH_FREE = range(6)
REPOSITORY_MAY_IMPORT = (
    *(
        "config",
        "environ",
        "types",
        "contract",
        "text",
        "grammar",
        "event",
        "lifecycle",
        "tracing",
        "metrics",
        "responder",
        "stub",
        "warmup",
    ),
)
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts not in (("__init__.py",), ("__main__.py",))
)


def line_of(module: str) -> int:
    """The longest name wins: models.spec is line 0, models is line 9."""
    best = ("", -1)
    for line, (names, _) in LINES.items():
        for name in names:
            covers = module == name or module.startswith((f"{name}.", f"{name}_"))
            if covers and len(name) > len(best[0]):
                best = (name, line)
    assert best[1] >= 0, f"nmoe_backend/{module} stands in no line: add it to docs/architecture.md and to this table"
    return best[1]


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, function bodies included, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write nmoe_backend.<module>"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if _file(name).exists() else str(node.module) for name in names}
    return {name.removeprefix("nmoe_backend.") for name in found if name.startswith("nmoe_backend.")}


def _file(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_lines_above(module: str) -> None:
    line, folder = line_of(module), module.rpartition(".")[0]
    for imported in imports_of(_file(f"nmoe_backend.{module}")):
        if folder.startswith("kernels.") and imported.startswith(f"{folder}."):
            continue  # the kernels of one folder share what they compute with
        assert line_of(imported) in LINES[line][1], (
            f"{module} (line {line}) imports {imported} (line {line_of(imported)})"
        )


@pytest.mark.parametrize("path", sorted(ROOT.glob("model_repository/*/1/*.py")), ids=lambda path: path.parts[-3])
def test_the_models_of_the_repository_are_thin(path: Path) -> None:
    for imported in imports_of(path):
        assert imported.split(".")[0].split("_")[0] in REPOSITORY_MAY_IMPORT, f"{path} imports {imported}"


def test_only_the_repository_imports_pb_utils() -> None:
    for module in MODULES:
        assert "import triton_python_backend_utils" not in _file(f"nmoe_backend.{module}").read_text(encoding="utf-8")


def test_the_control_plane_imports_without_torch() -> None:
    modules = [f"nmoe_backend.{module}" for module in MODULES if line_of(module) in (*TORCH_FREE, 12)]
    blocked = "import sys, importlib\nfor name in ('torch', 'triton', 'transformers'): sys.modules[name] = None\n"
    code = blocked + f"for module in {modules!r}: importlib.import_module(module)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

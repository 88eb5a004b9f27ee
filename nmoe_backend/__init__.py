"""nmoe_backend: the engine behind the `deepseek_v3` Triton model. docs/architecture.md is the plan of the house."""

__version__ = "0.1.0"

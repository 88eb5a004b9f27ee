"""Which tests run: GPU tests only when asked for, and then a missing GPU is an error and not a skip."""

from __future__ import annotations

import re

import pytest

pytest_plugins = ("tests.api.live",)

GPUS = {"gpu": 1, "gpu2": 2}  # marker -> devices that its tests need; the last one of a test's markers counts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the GPU tests too; an error on a machine without a GPU")


def is_wanted(marker: str, markexpr: str, gpu_option: bool) -> bool:
    """`-m gpu` and `--gpu` ask for tests on one GPU, `-m gpu2` for those on two; `-m "not gpu"` and an expression that
    does not name a marker do not."""
    words = re.findall(r"\w+", markexpr)
    named = any(word == marker and (index == 0 or words[index - 1] != "not") for index, word in enumerate(words))
    return named or (marker == "gpu" and gpu_option)


def num_gpus() -> int:
    """CUDA devices that torch sees. Imported here: most test runs need no torch."""
    import torch

    return torch.cuda.device_count()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [name for name in GPUS if is_wanted(name, config.getoption("markexpr"), config.getoption("gpu"))]
    for name in wanted:
        if (present := num_gpus()) < GPUS[name]:
            raise pytest.UsageError(
                f"GPU tests were asked for (-m {name} or --gpu), but torch sees {present} of the {GPUS[name]} CUDA "
                "devices that they need. Run them on a GPU machine with the gpu lock installed, or drop the option."
            )
    needs = {item: [name for name in GPUS if item.get_closest_marker(name)] for item in items}
    unwanted = {item for item, names in needs.items() if names and names[-1] not in wanted}
    if unwanted:
        config.hook.pytest_deselected(items=[*unwanted])
        items[:] = [item for item in items if item not in unwanted]

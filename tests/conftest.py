"""One thread for each process: bitwise equality holds for equal thread counts, and pytest -n 2 runs two side by side."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported, and for the scripts that tests start
)


@pytest.fixture(autouse=True, scope="session")
def fp32_unless_asked():
    """So that the tolerances of a test do not depend on what the CPU is fast in."""
    import runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "fast_bf16", lambda: False)
        yield


def pytest_collection_modifyitems(items):
    """test_cuda.py first: it pretends that a GPU is there, which PyTorch believes only before it has looked for one."""
    items.sort(key=lambda item: item.path.name != "test_cuda.py")

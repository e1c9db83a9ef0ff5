"""Eight simulated CPU devices, a GPU for many workers; last, notebooks' seconds and, with -v, the worst errors."""

import os
import sys

import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each would else take most of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_terminal_summary(terminalreporter, config):
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for seconds in (value for name, value in report.user_properties if name == "seconds"):
            terminalreporter.write_line(f"{report.nodeid}: {seconds:.0f} s")
    cases = sys.modules.get("tests.cases")
    if cases is None or config.get_verbosity() < 0:
        return
    for (dtype, kind, quantity), ratio in sorted(cases.MEASURED.items()):
        terminalreporter.write_line(f"{dtype:9s} {kind:7s} {quantity:15s} {ratio:.1e}")


@pytest.fixture(autouse=True, scope="module")
def _forget_what_was_compiled():
    """A worker of the whole suite aborted inside XLA's compiler: a process has room for so many memory mappings."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()

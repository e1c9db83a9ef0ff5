"""Tests on a GPU that compile the same kernel go to the same worker: `pytest -m gpu -n 15 --dist loadgroup`."""

import re

import pytest

from .small import GATES

KIND = re.compile("|".join(map(re.escape, GATES)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Groups by all but the kind of gates. (Marks do not group: xdist 3.8 does not reach pytest 9.1 with them.)"""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByKernel(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return KIND.sub("", nodeid)

    return ByKernel(config, log)

"""Tests on a GPU that compile the same kernel go to the same worker: `pytest -m gpu -n 12 --dist loadgroup`."""

import pytest


def pytest_collection_modifyitems(config, items):
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if item.get_closest_marker("gpu") and hasattr(item, "callspec"):
            compiled = {name: x for name, x in item.callspec.params.items() if name != "kind"}
            item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {compiled}"))

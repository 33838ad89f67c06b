"""The public names are there, though loaded late."""

from __future__ import annotations

from types import ModuleType

import pytest

import sqla_poolkit
from sqla_poolkit import testing


@pytest.mark.parametrize("module", [sqla_poolkit, testing])
def test_each_public_name_can_be_had_and_no_other(module: ModuleType):
    assert len(module.__all__) == len({id(getattr(module, name)) for name in module.__all__})
    for missing in ("missing", "_missing", "__missing__"):
        with pytest.raises(AttributeError, match=f"'{module.__name__}' has no .*'{missing}'"):
            getattr(module, missing)


@pytest.mark.parametrize("module", [sqla_poolkit, testing])
def test_they_are_offered_for_completion(module: ModuleType):
    assert set(module.__all__) <= set(dir(module))


def test_a_star_brings_all_of_them():
    names: dict[str, object] = {}
    exec("from sqla_poolkit import *", names)
    assert set(sqla_poolkit.__all__) <= names.keys()

"""One name per pool, unique in the process while that pool lives."""

from __future__ import annotations

import weakref

__all__ = ["unique_name"]

_owners: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()


def unique_name(wanted: str, owner: object) -> str:
    """Return ``wanted``, or ``wanted#2`` and so on if another living owner has that name."""
    name, number = wanted, 1
    while name in _owners:
        number += 1
        name = f"{wanted}#{number}"
    _owners[name] = owner
    return name

"""`copy_slots`: copies of small objects, for each sequence of each iteration."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def copy_slots(one: T) -> T:
    """`copy.copy`, three times as fast, of an object with all its attributes in ``__slots__``.

    The class must name them itself: those of its bases are left out.
    """
    kind = type(one)
    twin = kind.__new__(kind)
    for name in kind.__slots__:
        setattr(twin, name, getattr(one, name))
    return twin

"""`copy_slots`: fast copies of small objects, made for each sequence in each iteration."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def copy_slots(one: T) -> T:
    """Return a copy of an object with all its attributes in ``__slots__``.

    It is three times as fast as `copy.copy`. The object's class must name all attributes itself:
    the attributes of base classes are left out.
    """
    kind = type(one)
    twin = kind.__new__(kind)
    for name in kind.__dict__["__slots__"]:
        setattr(twin, name, getattr(one, name))
    return twin

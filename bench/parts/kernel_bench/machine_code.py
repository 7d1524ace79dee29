"""Looks for mistakes of the assembler in the machine code of a kernel, as `nvdisasm -c` prints it.

Two are known for Hopper. ptxas 12.8.93 may compute a matrix descriptor from uniform registers that
nothing has written: the tensor cores then read shared memory anywhere. And before CUDA 13.3 (its release
notes, "CUDA Tools") ptxas may use registers for something else while a product still reads them. Neither
shows before the kernel runs, and then often as wrong numbers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;"
)
_LABEL = re.compile(r"\.(L_x_\d+):")
_TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
_UNIFORM = re.compile(r"\bUR(\d+)\b")
# Pairs of uniform registers: the descriptor of a global access; two of the operands of a product.
_DESCRIPTOR = re.compile(r"\b(g?desc)\[UR(\d+)\]")
_PAIRS = (".64", ".WIDE")
_VECTOR = re.compile(r"R(\d+)(?:\.reuse)?")
# Instructions that may name a predicate, which they write too, before the register that they write.
_PREDICATE_FIRST = ("SHFL", "LOP3", "ATOM", "ULOP3", "R2UR", "VOTEU", "ELECT")
_PREDICATE = re.compile(r"U?P[T0-9]")
_EARLIER_GROUPS = re.compile(r"0x([0-9a-f]+)")
# Four registers of each thread hold the first operand of a product in 16 bits.
_OPERAND = 4


class Instruction(NamedTuple):
    """An instruction: its place, the predicate before it, its name, and its operands."""

    place: str
    predicate: str
    name: str
    operands: list[str]

    def __str__(self) -> str:
        return f"{self.place}: {self.name} {', '.join(self.operands)}"

    @property
    def is_product(self) -> bool:
        """True for a product of Hopper's, which runs while the program goes on."""
        return self.name.startswith(("HGMMA", "IGMMA", "QGMMA"))

    @property
    def result(self) -> str:
        """The operand that is written, unless the instruction writes none; empty without operands."""
        operands = self.operands
        if self.name.startswith(_PREDICATE_FIRST):
            operands = [one for one in operands if not _PREDICATE.fullmatch(one)]
        return operands[0] if operands else ""

    @property
    def first_operand(self) -> int | None:
        """The first register of a product's left side; ``None`` if that is in shared memory."""
        found = _VECTOR.fullmatch(self.operands[1]) if self.is_product else None
        return int(found[1]) if found else None


def problems(code: str) -> list[str]:
    """Return a line for each read of what is not there any more, or has never been."""
    instructions, followers = _parse(code)
    return [*_unwritten(instructions, followers), *_overwritten(instructions)]


def _parse(code: str) -> tuple[list[Instruction], list[list[int]]]:
    """Return the instructions, and for each the places in the list that may come next."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := _LINE.search(line):
            instructions.append(
                Instruction(found[1], found[2] or "", found[3], _operands(found[4]))
            )
    followers = []
    for i, one in enumerate(instructions):
        target = _TARGET.search(one.operands[-1]) if one.operands else None
        is_jump = one.name.startswith("BRA") and target is not None
        ends = one.name.startswith(("EXIT", "BRA")) and not one.predicate and len(one.operands) < 2
        nexts = [labels[target[1]]] if is_jump and target else []
        followers.append(nexts if ends else [*nexts, i + 1])
    return instructions, followers


def _operands(text: str) -> list[str]:
    """Return the operands, which commas separate outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[({]*[\])}])", text) if part.strip()]


def _unwritten(
    instructions: Sequence[Instruction], followers: Sequence[Sequence[int]]
) -> Iterator[str]:
    """Yield reads of uniform registers that are not written on every way there."""
    effects = [_uniform_registers(one) for one in instructions]
    written: list[frozenset[int] | None] = [None] * len(instructions)
    if instructions:
        written[0] = frozenset()
    work = [0] if instructions else []
    while work:
        i = work.pop()
        known = written[i]
        assert known is not None
        for j in followers[i]:
            if j < len(instructions):
                before, after = written[j], known | effects[i][0]
                written[j] = after if before is None else before & after
                if written[j] != before:
                    work.append(j)
    for one, (_, read), known in zip(instructions, effects, written, strict=True):
        missing = sorted(read - known) if known is not None else []
        if missing:
            names = ", ".join(f"UR{n}" for n in missing)
            yield f"nothing has written {names} before {one}"


def _uniform_registers(one: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    """Return the uniform registers that an instruction writes, and those that it reads."""
    written: set[int] = set()
    read: set[int] = set()
    is_wide = any(word in one.name for word in _PAIRS)
    operands = list(one.operands)
    if plain := _UNIFORM.fullmatch(one.result):
        written |= _run(int(plain[1]), 4 if ".128" in one.name else 2 if is_wide else 1)
        operands.remove(one.result)  # the first of that name
    for operand in operands:
        for kind, first in _DESCRIPTOR.findall(operand):
            # Of a product whose left side is in registers only the second pair counts.
            skip = 2 if kind == "gdesc" and one.first_operand is not None else 0
            read |= _run(int(first) + skip, (4 if kind == "gdesc" else 2) - skip)
        for number in _UNIFORM.findall(_DESCRIPTOR.sub("", operand)):
            read |= _run(int(number), 2 if one.name.startswith("UIADD3.64") else 1)
    return frozenset(written), frozenset(read)


def _overwritten(instructions: Sequence[Instruction]) -> Iterator[str]:
    """Yield writes to registers from which a product that nobody has waited for still reads."""
    groups: list[set[int]] = [set()]  # of products; the last one is not complete yet
    for one in instructions:
        if one.name.startswith("WARPGROUP.DEPBAR"):
            # So many of the latest complete groups may still be under way.
            found = _EARLIER_GROUPS.fullmatch(one.operands[-1])
            still = int(found[1], 16) if found else 0
            groups = [*groups[:-1][-still:], set()] if still else [set()]
        elif one.is_product:
            if one.first_operand is not None:
                groups[-1] |= _run(one.first_operand, _OPERAND)
            if one.operands[-1].startswith("gsb"):
                groups.append(set())
        elif set().union(*groups) & _vector_registers(one):
            yield f"a product still reads what is written by {one}"


def _vector_registers(one: Instruction) -> set[int]:
    """Return the registers of each thread that an instruction writes."""
    found = _VECTOR.fullmatch(one.result)
    if found is None or one.name.startswith(("ST", "RED", "BAR")):
        return set()
    words = one.name.split(".")
    in_parts = words[0] in ("HMMA", "IMMA")  # a product that each warp waits for
    is_four = "128" in words or "4" in words or (in_parts and "F16" not in words)
    is_pair = {"64", "WIDE", "2"} & {*words} or (words[0] == "CS2R" and "32" not in words)
    return _run(int(found[1]), 4 if is_four else 2 if is_pair or in_parts else 1)


def _run(first: int, length: int) -> set[int]:
    return set(range(first, first + length))

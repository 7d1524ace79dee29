"""Mistakes of an assembler are found in machine code as `nvdisasm` prints it."""

from __future__ import annotations

import pytest

from parts.kernel_bench.machine_code import problems

# A loop with a product whose left side is in registers, as a sound assembler makes it.
SOUND = """
        /*0000*/                   S2UR UR5, SR_CTAID.Y ;
        /*0010*/                   ULDC.64 UR6, c[0x0][0x260] ;
        /*0020*/              @!P1 BRA `(.L_x_0) ;
        /*0030*/                   UIADD3 UR10, UP0, UR5, 0x2, URZ ;
        /*0040*/                   UMOV UR11, 0x40000040 ;
.L_x_1:
        /*0050*/                   LDG.E.64 R2, desc[UR6][R8.64+0x10] ;
        /*0060*/                   F2FP.F16.F32.PACK_AB R56, R57, R56 ;
        /*0070*/                   HGMMA.64x64x16.F32 R24, R56, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   LDS.128 R56, [R105+UR10+0x3000] ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
.L_x_0:
        /*00b0*/                   EXIT ;
"""
HEAD, LOOP = SOUND.split(".L_x_1:")


def test_sound_code_has_no_problem() -> None:
    assert problems(SOUND) == []
    assert problems("") == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            SOUND.replace("UP0, UR5, 0x2", "UP0, UR17, 0x2"),
            "nothing has written UR17 before 0030: UIADD3 UR10, UP0, UR17, 0x2, URZ",
        ),
        # It is written on one of two ways to the loop.
        (
            SOUND.replace("UMOV UR11,", "BRA `(.L_x_1) ;\n /*0044*/ UMOV UR11,", 1).replace(
                "BRA `(.L_x_1)", "@P2 BRA `(.L_x_1)", 1
            ),
            "nothing has written UR11 before 0070: HGMMA.64x64x16.F32 R24, R56, gdesc[UR8].tnspB, "
            "R24, gsb0",
        ),
        (
            SOUND.replace("R24, R56, gdesc", "R24, gdesc").replace(".tnspB", ""),
            "nothing has written UR8, UR9 before 0070: HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0",
        ),
        (
            SOUND.replace("desc[UR6]", "desc[UR40]"),
            "nothing has written UR40, UR41 before 0050: LDG.E.64 R2, desc[UR40][R8.64+0x10]",
        ),
    ],
    ids=["never", "on one way", "a descriptor's half", "a global access"],
)
def test_uniform_registers_are_written_before_they_are_read(code: str, problem: str) -> None:
    assert problems(code) == [problem]


@pytest.mark.parametrize(
    "write",
    [
        "LDS.128 R56, [R105+UR10+0x3000]",
        "LDG.E.64 R58, desc[UR6][R8.64]",
        "IMAD.WIDE R58, R3, 0x2, R4",
        "MOV R59, R3",
        "CS2R R56, SRZ",
        "SHFL.BFLY PT, R57, R3, 0x1, 0x1f",
        "LOP3.LUT P0, R56, R3, 0x1, RZ, 0xc0, !PT",
        "LDSM.16.M88.2 R55, [R105]",
        "HMMA.16816.F32 R54, R8, R12, R14",
        "@P1 MOV R59, R3",
    ],
)
def test_what_a_product_reads_is_kept_until_it_has_ended(write: str) -> None:
    lines = SOUND.splitlines()
    place = next(i for i, line in enumerate(lines) if "DEPBAR" in line)
    early = [*lines[:place], f" /*0078*/ {write} ;", *lines[place:]]
    told = write.removeprefix("@P1 ")
    assert problems("\n".join(early)) == [f"a product still reads what is written by 0078: {told}"]
    late = [*lines[: place + 1], f" /*0088*/ {write} ;", *lines[place + 1 :]]
    assert problems("\n".join(late)) == []
    beside = [*lines[:place], " /*0078*/ LDS.128 R60, [R105] ;", *lines[place:]]
    assert problems("\n".join(beside)) == []


def test_waiting_for_earlier_products_is_no_waiting_for_the_latest() -> None:
    product = (
        "/*0070*/                   HGMMA.64x64x16.F32 R24, R56, gdesc[UR8].tnspB, R24, gsb0 ;"
    )
    latest = product.replace("R56", "R60").replace("0070", "0074")
    code = SOUND.replace(product, f"{product}\n {latest}").replace("gsb0, 0x0", "gsb0, 0x1")
    code = code.replace(
        "UIADD3 UR10, UP0, UR5",
        "UMOV UR8, UR5 ;\n /*0034*/ UMOV UR9, UR5 ;\n /*0038*/ UIADD3 UR10, UP0, UR5",
    )
    assert problems(code) == []
    code = code.replace("LDS.128 R56", "LDS.128 R60")
    (problem,) = problems(code)
    assert problem.startswith("a product still reads what is written by 0090: LDS.128 R60")


@pytest.mark.parametrize(
    "write",
    [
        "ULOP3.LUT UP0, UR12, UR5, 0x1, URZ, 0xc0, !UPT",
        "R2UR P0, UR12, R3",
        "VOTEU.ANY UR12, UPT, PT",
    ],
)
def test_a_predicate_may_come_before_what_is_written(write: str) -> None:
    head = HEAD.replace("BRA `(.L_x_0)", "NOP")
    read = "/*004c*/ UMOV UR13, UR12 ;\n /*0050*/ EXIT ;"
    assert problems(f"{head} /*0048*/ {write} ;\n {read}") == []
    compare = "UISETP.GE.AND UP0, UPT, UR12, UR5, UPT"
    (problem,) = problems(f"{head} /*0048*/ {compare} ;\n /*0050*/ EXIT ;")
    assert problem == f"nothing has written UR12 before 0048: {compare}"

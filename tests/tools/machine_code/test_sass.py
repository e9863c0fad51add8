"""Reading machine code: short programs with known instructions and known ways through them."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import sass
from benchmarks.machine_code.paths import Paths, read_paths

# As cuobjdump prints it, with the encoding behind the instructions.
STRAIGHT = """
        Function : kernel
    .headerflags    @"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000e220000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;                           /* 0x0000000000007919 */
        /*0020*/                   IMAD.WIDE R2, R0, 0x10, R2 ;
        /*0030*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/                   MUFU.RSQ R5, R4 ;
        /*0060*/                   F2F.F64.F32 R8, R4 ;
        /*0070*/                   DFMA R8, R8, R8, R8 ;
        /*0080*/                   IMAD.MOV.U32 R9, RZ, RZ, R8 ;
        /*0090*/                   HFMA2.MMA R10, -RZ, RZ, 0, 0 ;
        /*00a0*/                   LOP3.LUT R10, R10, R9, RZ, 0x3c, !PT ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/                   STL [R1+0x4], R10 ;
        /*00d0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
        /*0100*/                   NOP;
"""


def program(text: str) -> list[sass.Instruction]:
    """Number the lines of a program as machine code does; a line may begin with a name that branches use."""
    lines = [line.split() for line in text.strip().splitlines()]
    places = {words[0]: 16 * index for index, words in enumerate(lines) if words[0].endswith(":")}
    rendered = []
    for index, words in enumerate(lines):
        words = [hex(places[f"{word}:"]) if f"{word}:" in places else word for word in words]
        rendered.append(f"/*{16 * index:04x}*/ {' '.join(word for word in words if word not in places)} ;")
    return sass.parse("\n".join(rendered))


def sizes(paths: Paths, trips: dict[int, int] | None = None) -> dict[str, int]:
    """Return how many instructions each path executes."""
    return {"+".join(sorted(path.labels)): path.total(trips or {}).total() for path in paths.paths}


class TestInstructions:
    def test_every_instruction_is_found_with_its_class(self):
        instructions = sass.parse(STRAIGHT)
        assert [instruction.address for instruction in instructions] == list(range(0, 0x110, 0x10))
        counts = dict.fromkeys(sass.CLASSES, 0)
        for instruction in instructions[:15]:
            counts[instruction.kind.name] += 1
        assert counts == {
            "float32": 1,
            "float64": 1,
            "integer and logic": 2,
            "conversion": 1,
            "special function": 1,
            "global load": 1,
            "global store": 1,
            "spill": 1,
            "shared and barrier": 1,
            "control and move": 5,
        }

    def test_operands(self):
        load = sass.parse(STRAIGHT)[3]
        assert (load.guard, load.opcode, load.mnemonic) == ("!P0", "LDG.E.128", "LDG")
        assert load.is_access
        assert (load.direction, load.access_bytes) == ("load", 16)

    @pytest.mark.parametrize(
        ("opcode", "width"),
        [
            ("LDG.E", 4),
            ("LDG.E.64.CONSTANT", 8),
            ("LDG.E.EF.128", 16),
            ("STG.E.U8", 1),
            ("STG.E.U16", 2),
            ("LDG.E.ENL2.256", 32),
        ],
    )
    def test_access_width(self, opcode, width):
        assert sass.Instruction(0, "", opcode, "").access_bytes == width

    def test_units(self):
        clocks = sass.unit_clocks(read_paths(sass.parse(STRAIGHT)).paths[0].total({}))
        # fma: FFMA and HFMA2 a quarter of a clock, both IMAD a half. special: MUFU and F2F, two clocks each.
        assert clocks == {"fma": 1.5, "memory": 3.0, "special": 4.0, "float64": 0.5, "alu": 0.5}


class TestPaths:
    def test_nvdisasm_names_addresses(self):
        code = sass.parse("""
        .L_x_0:
        .L_x_1:
                /*0000*/              @!P0 CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_rn_f64_full) ;
                /*0010*/               @P0 BRA P1, `(.L_x_1) ;
                /*0020*/                   EXIT ;
                .weak           $__internal_0_$__cuda_sm20_div_rn_f64_full
        $__internal_0_$__cuda_sm20_div_rn_f64_full:
                /*0030*/                   RET.REL.NODEC R2 `(kernel) ;
        kernel:
                /*0040*/                   BRA `(.L_x_0);
        """)
        assert [(i.mnemonic, i.target) for i in code] == [
            ("CALL", 0x30),
            ("BRA", 0),
            ("EXIT", None),
            ("RET", None),
            ("BRA", 0),
        ]

    def test_a_call_that_does_not_come_back_is_a_branch(self):
        code = program("""
            loop: FADD
            @!P0 CALL.REL.NOINC out
            BRA loop
            out: FMUL
            EXIT
        """)
        paths = read_paths(code)
        assert sizes(paths, {0: 5}) == {"": 5 * 3 + 2}

    def test_straight_code_ends_at_its_exit(self):
        paths = read_paths(sass.parse(STRAIGHT))
        assert sizes(paths) == {"": 15}
        assert paths.reachable == set(range(0, 0xF0, 0x10))

    def test_the_longest_way_counts_where_nothing_tells_them_apart(self):
        code = program("""
            ISETP P0
            @P0 BRA long
            FADD
            BRA end
            long: FADD
            FADD
            FADD
            end: EXIT
        """)
        assert sizes(read_paths(code)) == {"": 6}

    @pytest.mark.parametrize("branch", ["@P0 BRA end", "BRA.U !UP0, end", "@!P1 BRA P2, end"])
    def test_what_a_branch_may_pass_over_counts(self, branch):
        code = program(f"ISETP P0\n{branch}\nFADD\nend: EXIT")
        assert sizes(read_paths(code)) == {"": 4}

    def test_unconditional_branches_are_followed(self):
        code = program("@PT BRA end\nFADD\nend: EXIT")
        assert sizes(read_paths(code)) == {"": 2}

    def test_subroutines_are_for_rare_operands(self):
        code = program("""
            @P0 BRA fast
            FADD
            FADD
            CALL.REL.NOINC slow
            fast: EXIT
            slow: FADD
            RET.REL.NODEC R2 0x0
        """)
        assert sizes(read_paths(code)) == {"": 2}

    def test_a_call_without_a_way_around_counts(self):
        code = program("CALL.REL.NOINC slow\nFADD\nEXIT\nslow: RET.REL.NODEC R2 0x0")
        assert sizes(read_paths(code)) == {"": 3}

    def test_an_early_exit_is_a_way(self):
        code = program("@!P0 EXIT\nSTG.E\nEXIT")
        assert sizes(read_paths(code)) == {"": 3}

    def test_loops_count_per_iteration(self):
        code = program("""
            @P1 BRA end
            outer: FADD
            inner: FMUL
            @P0 BRA inner
            FADD
            @P0 BRA outer
            end: EXIT
        """)
        paths = read_paths(code)
        assert {hex(start): sorted(map(hex, inside)) for start, inside in paths.loops.items()} == {
            "0x10": ["0x10", "0x20", "0x30", "0x40", "0x50"],
            "0x20": ["0x20", "0x30"],
        }
        # 2 outside, 3 in each of 5 iterations, and 2 in each of 7 in each of those.
        assert sizes(paths, {0x10: 5, 0x20: 7}) == {"": 2 + 5 * (3 + 7 * 2)}

    def test_labels_tell_ways_apart(self):
        body = "\n".join(["FADD"] * 10)
        code = program(f"""
            @P0 BRA masked
            @P1 BRA tail
            {body}
            BRA end
            tail: FMUL
            {body}
            {body}
            end: FADD
            masked: EXIT
        """)
        labels = {16 * index: "inside" for index in range(2, 12)} | {
            16 * index: "tail" for index in range(13, 34)
        }
        assert sizes(read_paths(code, labels)) == {"": 2, "inside": 15, "tail": 25}

    def test_a_label_is_taken_everywhere_or_nowhere(self):
        body = "\n".join(["DADD"] * 10)
        common = "\n".join(["FADD"] * 10)
        code = program(f"""
            {common}
            @P0 BRA first
            {body}
            first: FADD
            @P0 BRA second
            {body}
            second: EXIT
        """)
        labels = {16 * index: "inside" for index in range(10)}
        labels |= {16 * index: "wide" for index in (*range(11, 21), *range(23, 33))}
        assert sizes(read_paths(code, labels)) == {"inside": 14, "inside+wide": 34}

    def test_few_instructions_with_a_label_are_the_compilers_doing(self):
        code = program("@P0 BRA end\nFADD\nFADD\nend: EXIT")
        assert sizes(read_paths(code, {16: "tail", 32: "tail"})) == {"": 4}

    def test_what_cannot_be_followed_is_refused(self):
        with pytest.raises(ValueError, match="BRX"):
            read_paths(program("BRX R2 -0x10\nEXIT"))

"""SASS of kernels for sm_80 to sm_90: reads what nvdisasm prints, and times one warp.

``parse`` reads instructions, their scheduling fields and the chains of inlined source lines. ``Clock`` issues
executed instructions in order, by stall counts and by scoreboards with assumed latencies. sass_warp.py finds
which instructions execute, and sass_cycles.py puts the parts together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

# Cycles from issue to the release of the scoreboard that guards the result. Loads of global memory hit L2.
LATENCIES = {
    "LDG": 280, "LDGSTS": 280, "ATOMG": 280, "LD": 280, "LDS": 30, "LDSM": 33, "ATOMS": 60, "LDC": 30,
    "MOVM": 33, "SHFL": 25, "S2R": 25, "S2UR": 25, "MUFU": 22, "I2F": 22, "F2I": 22, "F2F": 22, "FCHK": 22,
    "POPC": 22, "FLO": 22, "BREV": 22,
}  # fmt: skip
OTHER_LATENCY = 22
# Cycles from issue until a memory instruction has read its registers.
READ_LATENCY = 20


@dataclass(frozen=True)
class Control:
    """The scheduling fields of a 128-bit instruction.

    Attributes:
        stall: Cycles before the next instruction of the warp may issue.
        write: Scoreboard that the result releases, or None.
        read: Scoreboard that the reading of the operands releases, or None.
        wait: Scoreboards that must be free before this instruction issues.
    """

    stall: int
    write: int | None
    read: int | None
    wait: tuple[int, ...]


def control(high: int) -> Control:
    """Decodes bits 105 to 121 of an instruction from its high 64-bit word."""
    fields = high >> 41
    write, read, wait = fields >> 5 & 7, fields >> 8 & 7, fields >> 11 & 63
    return Control(
        stall=max(fields & 15, 1),
        write=None if write == 7 else write,
        read=None if read == 7 else read,
        wait=tuple(i for i in range(6) if wait >> i & 1),
    )


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "", "P0", "!P0", "UP0", ...
    opcode: str
    operands: tuple[str, ...]
    control: Control
    source: tuple[tuple[str, int], ...]  # (file, line) from the innermost inlined function outwards

    @cached_property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @cached_property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([^;]*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_SOURCE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"^(\S+):\s*$")


def parse(listing: str, pattern: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions and labels of the one kernel whose section name contains `pattern`.

    Args:
        listing: What ``nvdisasm -c -gi -hex`` prints.
        pattern: A part of the kernel's mangled name.

    Returns:
        The instructions in address order, and the addresses of the labels.

    Raises:
        ValueError: The listing has no such kernel, or several.
    """
    sections = re.split(r"^//-+ (\.\S+) -+$", listing, flags=re.MULTILINE)
    found = [
        text
        for name, text in zip(sections[1::2], sections[2::2], strict=True)
        if name.startswith(".text.") and pattern in name
    ]
    if len(found) != 1:
        raise ValueError(
            f"one kernel must contain {pattern!r} in its name, got {len(found)}; name it in full"
        )
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    chain: list[tuple[str, int]] = []
    fresh = True  # the next source line begins a new chain
    lines = iter(found[0].splitlines())
    for line in lines:
        if match := _SOURCE.match(line):
            chain = [] if fresh else chain
            chain.append((match[1], int(match[2])))
            fresh = False
        elif match := _LINE.match(line):
            high = _HIGH.match(next(lines))
            assert high is not None
            words = match[3].split(None, 1)
            operands = words[1].replace(".reuse", "").split(",") if len(words) > 1 else []
            at = int(match[1], 16)
            labels |= dict.fromkeys(pending, at)
            pending, fresh = [], True
            fields = control(int(high[1], 16))
            stripped = tuple(operand.strip() for operand in operands)
            code.append(Instruction(at, match[2] or "", words[0], stripped, fields, tuple(chain)))
        elif match := _LABEL.match(line):
            pending.append(match[1])
    return code, labels


# ---- time ----------------------------------------------------------------------------------------


@dataclass
class Clock:
    """In-order issue of one warp.

    An instruction issues when the stall count of the one before has passed and its scoreboards are free.
    Nothing else costs time: no other warps, no bank conflicts, no full queues, no misses of the instruction
    cache, no latency of taken branches beyond their stall count.

    Attributes:
        now: The cycle in which the next instruction may issue at the earliest.
    """

    now: int = 0
    _busy: dict[int, list[int]] = field(default_factory=lambda: {i: [] for i in range(6)})
    _copies: int = 0  # when the last asynchronous copy ends

    def issue(self, code: Instruction, active: bool = True) -> tuple[int, int]:
        """Issues one instruction.

        Args:
            code: The instruction.
            active: Whether its guard holds. If not, it takes its turn and does nothing.

        Returns:
            Cycles that it waited for scoreboards, and cycles until the next may issue.
        """
        ready = max((end for i in code.control.wait for end in self._busy[i]), default=0)
        if code.name == "DEPBAR":
            board, left = int(code.operands[0].removeprefix("SB")), int(code.operands[1], 16)
            ends = sorted(self._busy[board])
            ready = max([ready, *ends[: len(ends) - left]])
        at = max(self.now, ready)
        waited = at - self.now
        for ends in self._busy.values():
            ends[:] = [end for end in ends if end > at]
        latency = LATENCIES.get(code.name, OTHER_LATENCY) if active else 1
        if code.name == "LDGSTS" and active:
            self._copies = max(self._copies, at + latency)
        end = max(self._copies, at + 1) if code.name == "LDGDEPBAR" else at + latency
        if code.control.write is not None:
            self._busy[code.control.write].append(end)
        if code.control.read is not None:
            self._busy[code.control.read].append(at + (READ_LATENCY if active else 1))
        self.now = at + code.control.stall
        return waited, code.control.stall

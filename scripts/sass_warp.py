"""Runs SASS (sass.py) with the 32 lanes of one warp, to know which instructions it executes.

Opcodes that the decode kernels do not use are errors: add them where _does registers the others.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sass import Instruction

MASK = 0xFFFFFFFF
UNSET = 0x3F803F80  # a word of global memory


def bits(x: float) -> int:
    """The float32 nearest to x, as 32 bits."""
    try:
        return int.from_bytes(struct.pack("<f", x), "little")
    except OverflowError:
        return 0x7F800000 if x > 0 else 0xFF800000


def real(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word & MASK))[0])


def signed(word: int) -> int:
    return (word & MASK) - (1 << 32) if word & 0x80000000 else word & MASK


def _up(x: int) -> int:
    """x >= 0 as float32, rounded up."""
    word = bits(float(x))
    return word + 1 if real(word) < x else word


def _mufu(function: str, x: float) -> float:
    match function:
        case "RCP":
            return math.copysign(math.inf, x) if x == 0 else 1 / x
        case "EX2":
            return 0.0 if x == -math.inf else 2.0 ** min(x, 200.0)
        case "LG2":
            return -math.inf if x == 0 else math.log2(x) if x > 0 else math.nan
        case "RSQ":
            return math.inf if x == 0 else x**-0.5 if x > 0 else math.nan
        case "SQRT":
            return math.sqrt(x) if x >= 0 else math.nan
    raise NotImplementedError(f"MUFU.{function}")


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


# Operands: (kind, ...) of a text, parsed once.
@functools.cache
def _operand(text: str) -> tuple[str, str, int]:
    if match := re.fullmatch(r"(U?R)(\d+|Z)(?:\.(\w+))?", text):
        part = match[3] if match[3] in ("H0_H0", "H1_H1") else ""
        return match[1] + part, "", -1 if match[2] == "Z" else int(match[2])
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
        return "c", "", int(match[1], 16)
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return "bits", "", int(text, 16) & MASK
    if text[0] in "-~":
        return text[0], text[1:], 0
    if text[0] == "|":
        return "|", text.strip("|"), 0
    return "number", text.lstrip("+").lower(), 0


@functools.cache
def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


@dataclass
class Thread:
    """The registers of one lane, and what its warp and its block share.

    Attributes:
        lane: Its index in the warp.
        constants: Words of constant bank 0 by byte offset.
        memory: Words of global memory by address.
        shared: Words of shared memory by address.
        uniform: Registers of the uniform datapath.
        flags: Predicates of the uniform datapath.
    """

    lane: int
    constants: dict[int, int]
    memory: dict[int, int]
    shared: dict[int, int]
    uniform: dict[int, int]
    flags: dict[str, bool]
    registers: dict[int, int] = field(default_factory=dict)
    predicates: dict[str, bool] = field(default_factory=dict)

    def predicate(self, name: str) -> bool:
        if name[0] == "!":
            return not self.predicate(name[1:])
        return name in ("PT", "UPT") or (self.flags if name[0] == "U" else self.predicates).get(name, False)

    def set_predicate(self, name: str, value: bool) -> None:
        if name not in ("PT", "UPT"):
            (self.flags if name[0] == "U" else self.predicates)[name] = value

    def value(self, text: str, floats: bool = False, wide: bool = False) -> int:
        """The 32 bits of an operand. With `wide`, a negated integer is ~x + 1 with its carry."""
        kind, inner, number = _operand(text)
        match kind:
            case "R":
                return self.registers.get(number, 0)
            case "UR":
                return self.uniform.get(number, 0)
            case "c":
                return self.constants.get(number, 0)
            case "bits":
                return number
            case "-" if floats:
                return self.value(inner, floats) ^ 0x80000000
            case "-":
                x = (self.value(inner) ^ MASK) + 1
                return x if wide else x & MASK
            case "~":
                return self.value(inner) ^ MASK
            case "|":
                return self.value(inner, True) & 0x7FFFFFFF
            case "RH0_H0" | "RH1_H1":
                return self.registers.get(number, 0) >> (16 if kind == "RH1_H1" else 0) & 0xFFFF
        return bits(math.nan if "nan" in inner else float(inner)) if floats else int(inner) & MASK

    def real(self, text: str) -> float:
        return real(self.value(text, floats=True))

    def pair(self, text: str) -> int:
        """64 bits from two adjacent registers or constants; an immediate is sign-extended."""
        kind, _, number = _operand(text)
        if kind in ("R", "UR", "c"):
            if number < 0:
                return 0
            words = {"R": self.registers, "UR": self.uniform, "c": self.constants}[kind]
            return words.get(number, 0) | words.get(number + (4 if kind == "c" else 1), 0) << 32
        return signed(self.value(text)) & (1 << 64) - 1

    def put(self, name: str, *words: int) -> None:
        """Writes words to a register and those after it."""
        kind, _, number = _operand(name)
        if number >= 0:
            registers = self.uniform if kind == "UR" else self.registers
            for i, word in enumerate(words):
                registers[number + i] = word & MASK

    def group(self, name: str, count: int) -> list[int]:
        """The words of a register and those after it."""
        kind, _, number = _operand(name)
        registers = self.uniform if kind == "UR" else self.registers
        return [registers.get(number + i, 0) if number >= 0 else 0 for i in range(count)]

    def address(self, text: str) -> int:
        """The sum inside the last brackets of a memory operand."""
        total = 0
        for part in text[text.rindex("[") + 1 : -1].split("+"):
            if part.startswith("-"):
                total -= int(part[1:], 16)
            elif part.endswith(".64"):
                total += self.pair(part)
            elif part:
                total += self.value(part)
        return total


_NOTHING = {
    "NOP", "WARPSYNC", "BAR", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "DEPBAR", "LDGDEPBAR", "LDGSTS",
    "ENDCOLLECTIVE", "YIELD", "ACQBULK", "PREEXIT", "RED",
}  # fmt: skip
Execute = Callable[[Thread, list[str], list[str]], None]
_EXECUTE: dict[str, Execute] = {}


def _does(*names: str) -> Callable[[Execute], Execute]:
    def register(function: Execute) -> Execute:
        _EXECUTE.update(dict.fromkeys(names, function))
        return function

    return register


def _carries(operands: list[str]) -> tuple[str, list[str], list[str]]:
    """Splits into the result, the predicates that take carries, and the sources."""
    outs: list[str] = []
    while _is_predicate(operands[1 + len(outs)]):
        outs.append(operands[1 + len(outs)])
    return operands[0], outs, operands[1 + len(outs) :]


# Opcodes with one result that follows from the values of the sources.
def _computes(name: str, function: Callable[..., int]) -> None:
    def execute(t: Thread, modifiers: list[str], operands: list[str]) -> None:
        t.put(operands[0], function(*(t.value(x) for x in operands[1:] if not _is_predicate(x))))

    _EXECUTE[name] = execute


def _computes_real(name: str, function: Callable[..., float]) -> None:
    def execute(t: Thread, modifiers: list[str], operands: list[str]) -> None:
        t.put(operands[0], bits(function(*(t.real(x) for x in operands[1:] if not _is_predicate(x)))))

    _EXECUTE[name] = execute


for _copy in ("MOV", "R2UR", "MOVM"):
    _computes(_copy, lambda x: x)
_computes("IABS", lambda x: abs(signed(x)))
_computes("POPC", lambda x: bin(x).count("1"))
_computes("BREV", lambda x: int(f"{x:032b}"[::-1], 2))
_computes_real("FADD", lambda a, b: a + b)
_computes_real("FMUL", lambda a, b: a * b)
_computes_real("FFMA", lambda a, b, c: a * b + c)
_EXECUTE["MUFU"] = lambda t, modifiers, x: t.put(x[0], bits(_mufu(modifiers[0], t.real(x[1]))))
_EXECUTE["FCHK"] = lambda t, modifiers, x: t.set_predicate(x[0], False)
_EXECUTE["HMMA"] = lambda t, modifiers, x: t.put(x[0], *t.group(x[3], 4))
_EXECUTE["LDSM"] = lambda t, modifiers, x: t.put(x[0], *[0] * int(modifiers[-1]))


@_does("FLO")
def _flo(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    x = t.value(operands[1])
    t.put(operands[0], 32 - x.bit_length() if "SH" in modifiers and x else x.bit_length() - 1)


@_does("IADD3", "IADD", "VIADD")
def _iadd3(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    to, outs, sources = _carries(operands)
    terms = [t.value(x, wide=True) for x in sources if not _is_predicate(x)]
    total = sum(terms) + sum(t.predicate(x) for x in sources if _is_predicate(x) and "X" in modifiers)
    for i, out in enumerate(outs):
        t.set_predicate(out, total >> 32 > i)
    t.put(to, total)


@_does("IMAD")
def _imad(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    to, outs, sources = _carries(operands)
    carry = sum(t.predicate(x) for x in sources[3:])
    a, b = t.value(sources[0]), t.value(sources[1])
    if "WIDE" in modifiers or "HI" in modifiers:
        product = a * b if "U32" in modifiers else signed(a) * signed(b)
        total = (product & (1 << 64) - 1) + t.pair(sources[2]) + carry
        if outs:
            t.set_predicate(outs[0], total >> 64 > 0)
        t.put(to, *([total, total >> 32] if "WIDE" in modifiers else [total >> 32]))
    else:
        t.put(to, a * b + t.value(sources[2]) + carry)


@_does("LEA")
def _lea(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    to, outs, sources = _carries(operands)
    carry = t.predicate(sources.pop()) if _is_predicate(sources[-1]) else False
    low, added, shift = t.value(sources[0]), t.value(sources[1], wide=True), t.value(sources[-1])
    if "HI" in modifiers:
        high = signed(low) >> 31 if "SX32" in modifiers else t.value(sources[2])
        low = ((high & MASK) << 32 | low) << shift >> 32 & MASK
    else:
        low = low << shift & MASK
    total = low + added + ("X" in modifiers and carry)
    for out in outs:
        t.set_predicate(out, total >> 32 > 0)
    t.put(to, total)


@_does("SHF")
def _shf(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    to, low, by, high = operands
    x = t.value(high) << 32 | t.value(low)
    x = x - (1 << 64) if modifiers[1].startswith("S") and x >> 63 else x
    shift = t.value(by)
    shift = shift & 63 if "W" in modifiers else min(shift, 63)
    x = x << shift if modifiers[0] == "L" else x >> shift
    t.put(to, x >> 32 if "HI" in modifiers else x)


@_does("LOP3")
def _lop3(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    out = operands.pop(0) if _is_predicate(operands[0]) else None
    a, b, c, table = (t.value(x) for x in operands[1:5])
    terms = (
        (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1
    )
    result = 0
    for term in terms:
        result |= term & MASK
    t.put(operands[0], result)
    if out:
        t.set_predicate(out, result != 0)


@_does("PLOP3")
def _plop3(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    index = sum(t.predicate(x) << 2 - i for i, x in enumerate(operands[2:5]))
    for out, table in zip(operands[:2], operands[5:7], strict=True):
        t.set_predicate(out, bool(int(table, 16) >> index & 1))


@_does("ISETP")
def _isetp(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    x, y = t.value(operands[2]), t.value(operands[3])
    if "U32" not in modifiers:
        x, y = signed(x), signed(y)
    # Of 64 bits this is the high half, and the last operand is the result of the low half.
    result = t.predicate(operands[5]) if "EX" in modifiers and x == y else _COMPARE[modifiers[0]](x, y)
    _set_both(t, result, modifiers, operands)


@_does("FSETP")
def _fsetp(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    x, y = t.real(operands[2]), t.real(operands[3])
    unordered = math.isnan(x) or math.isnan(y)
    compare = modifiers[0]
    if compare in ("NUM", "NAN"):
        result = unordered == (compare == "NAN")
    elif len(compare) == 3:  # GEU, NEU, ...: true of NaN
        result = unordered or _COMPARE[compare[:2]](x, y)
    else:
        result = not unordered and _COMPARE[compare](x, y)
    _set_both(t, result, modifiers, operands)


def _set_both(t: Thread, result: bool, modifiers: list[str], operands: list[str]) -> None:
    logic, other = next(x for x in modifiers if x in ("AND", "OR", "XOR")), t.predicate(operands[4])
    for out, x in ((operands[0], result), (operands[1], not result)):
        t.set_predicate(out, {"AND": x and other, "OR": x or other, "XOR": x != other}[logic])


@_does("SEL", "FSEL")
def _sel(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    to, a, b, which = operands
    t.put(
        to, t.value(a if t.predicate(which) else b, floats=re.search(r"INF|QNAN|\.\d|\|", a + b) is not None)
    )


@_does("VIMNMX", "VIADDMNMX")
def _vimnmx(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    *sources, smaller = operands[1:]
    x, y = t.value(sources[-2]), t.value(sources[-1])
    if len(sources) == 3:
        x = t.value(sources[0]) + x
    if "U32" not in modifiers:
        x, y = signed(x), signed(y)
    t.put(operands[0], min(x, y) if t.predicate(smaller) else max(x, y))


@_does("PRMT")
def _prmt(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    data = (t.value(operands[1]) | t.value(operands[3]) << 32).to_bytes(8, "little")
    selector, result = t.value(operands[2]), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    t.put(operands[0], result)


@_does("P2R")
def _p2r(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    mask = t.value(operands[3])
    flags = sum(t.predicate(f"P{i}") << i for i in range(7))
    t.put(operands[0], t.value(operands[2]) & ~mask | flags & mask)


@_does("R2P")
def _r2p(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    word, mask = t.value(operands[1]), t.value(operands[2])
    for i in range(7):
        if mask >> i & 1:
            t.set_predicate(f"P{i}", bool(word >> i & 1))


@_does("S2R", "S2UR", "CS2R")
def _s2r(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    value = t.lane if operands[1] in ("SR_TID.X", "SR_LANEID") else 0
    t.put(operands[0], value, *([] if "32" in modifiers or operands[1] != "SRZ" else [0]))


@_does("I2F", "I2FP")
def _i2f(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    if "U64" in modifiers or "S64" in modifiers:
        x = t.pair(operands[1])
        x = x - (1 << 64) if "S64" in modifiers and x >> 63 else x
    else:
        x = t.value(operands[1])
        x = x if "U32" in modifiers else signed(x)
    t.put(operands[0], _up(x) if "RP" in modifiers and x >= 0 else bits(float(x)))


@_does("F2I")
def _f2i(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    x, wide = t.real(operands[1]), "U64" in modifiers or "S64" in modifiers
    most = (1 << (64 if wide else 32)) - 1 if "U32" in modifiers or "U64" in modifiers else (1 << 31) - 1
    least = 0 if "U32" in modifiers or "U64" in modifiers else -most - 1
    x = 0 if math.isnan(x) else min(max(x, float(least)), float(most))
    whole = min(
        math.floor(x) if "FLOOR" in modifiers else math.ceil(x) if "CEIL" in modifiers else int(x), most
    )
    t.put(operands[0], *([whole, whole >> 32] if wide else [whole]))


@_does("FMNMX")
def _fmnmx(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    pair = [x for x in (t.real(operands[1]), t.real(operands[2])) if not math.isnan(x)]
    choose = min if t.predicate(operands[3]) else max
    t.put(operands[0], bits(choose(pair, default=math.nan)))


@_does("F2FP")
def _f2fp(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    halves = []
    for text in operands[1:3]:
        word = t.value(text, floats=True)
        rounded = word + 0x7FFF + (word >> 16 & 1) >> 16
        halves.append(
            rounded if "BF16" in modifiers else int.from_bytes(struct.pack("<e", real(word)), "little")
        )
    t.put(operands[0], halves[0] << 16 | halves[1])


# ---- memory


def _words(modifiers: list[str]) -> int:
    return 4 if "128" in modifiers else 2 if "64" in modifiers else 1


def _bytes(modifiers: list[str]) -> int | None:
    """The size of an access below a word, or None."""
    return next((int(x[1:]) // 8 for x in modifiers if re.fullmatch(r"[US](8|16)", x)), None)


def _load(t: Thread, memory: dict[int, int], unset: int, at: int, modifiers: list[str], to: str) -> None:
    words = [memory.get((at & ~3) + 4 * i, unset) for i in range(_words(modifiers))]
    if size := _bytes(modifiers):
        words[0] = words[0] >> 8 * (at & 3) & (1 << 8 * size) - 1
        if any(x in modifiers for x in ("S8", "S16")) and words[0] >> 8 * size - 1:
            words[0] -= 1 << 8 * size
    t.put(to, *words)


def _store(t: Thread, memory: dict[int, int], at: int, modifiers: list[str], what: str) -> None:
    if _bytes(modifiers):
        return  # no kernel reads again what it stores in halves
    for i, word in enumerate(t.group(what, _words(modifiers))):
        memory[at + 4 * i] = word


@_does("LDG", "LD")
def _ldg(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    to, where = [x for x in operands if not _is_predicate(x)][:2]
    _load(t, t.memory, UNSET, t.address(where), modifiers, to)


@_does("LDS")
def _lds(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    _load(t, t.shared, 0, t.address(operands[1]), modifiers, operands[0])


@_does("LDC")
def _ldc(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    match = re.fullmatch(r"c\[0x0\](\[.*\])", operands[1])
    if match is None:
        raise NotImplementedError(f"the constant {operands[1]}")
    _load(t, t.constants, 0, t.address(match[1]), modifiers, operands[0])


@_does("STG", "ST")
def _stg(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    _store(t, t.memory, t.address(operands[0]), modifiers, operands[1])


@_does("STS")
def _sts(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    _store(t, t.shared, t.address(operands[0]), modifiers, operands[1])


@_does("ATOMG")
def _atomg(t: Thread, modifiers: list[str], operands: list[str]) -> None:
    to, where, what = [x for x in operands if not _is_predicate(x)][:3]
    at = t.address(where)
    before = t.memory.get(at, UNSET)
    if "ADD" not in modifiers:
        raise NotImplementedError(f"ATOMG.{'.'.join(modifiers)}")
    t.memory[at] = before + t.value(what) & MASK
    t.put(to, before)


# ---- the warp


@dataclass
class Warp:
    """Warp 0 of block 0: 32 lanes that run together where their addresses agree.

    Lanes that diverge run by the lowest address first, and BSYNC makes them wait for each other as BSSY says.

    What one warp cannot know has stand-ins. Tensor-core products add nothing. Tiles that LDSM loads are
    zeros, and so is shared memory that this warp did not write. Global memory that was not set is
    ``0x3f803f80``: 1.0 as bf16, about 1.0 as float32. Divisions of floats take their fast path (FCHK).
    """

    code: list[Instruction]
    labels: dict[str, int]
    constants: dict[int, int]
    memory: dict[int, int]
    threads: list[Thread] = field(init=False)
    barriers: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shared: dict[int, int] = {}
        uniform: dict[int, int] = {}
        flags: dict[str, bool] = {}
        self.threads = [Thread(i, self.constants, self.memory, shared, uniform, flags) for i in range(32)]

    def run(self, most: int = 200_000) -> Iterator[tuple[Instruction, bool]]:
        """Executes to the end.

        Args:
            most: Give up after this many instructions.

        Yields:
            Each instruction that the warp issues, and whether its guard holds for any lane.

        Raises:
            NotImplementedError: An opcode is not known here.
            RuntimeError: The warp does not come to its end.
        """
        by_address = {x.address: x for x in self.code}
        following = {x.address: y.address for x, y in itertools.pairwise(self.code)}
        at = {t.lane: self.code[0].address for t in self.threads}
        waiting: dict[int, str] = {}
        for _ in range(most):
            ready = {lane: x for lane, x in at.items() if lane not in waiting}
            if not at:
                return
            if not ready:
                raise RuntimeError(f"all lanes wait at {waiting}")
            here = min(ready.values())
            together = [lane for lane, x in ready.items() if x == here]
            code = by_address[here]
            active = [
                self.threads[i] for i in together if not code.guard or self.threads[i].predicate(code.guard)
            ]
            for lane in together:
                at[lane] = following.get(here, -1)
            self._step(code, active, at, waiting)
            yield code, bool(active)
        raise RuntimeError(f"the warp has not ended after {most} instructions; it may wait for another warp")

    def _step(
        self, code: Instruction, active: list[Thread], at: dict[int, int], waiting: dict[int, str]
    ) -> None:
        name, operands, modifiers = code.name, list(code.operands), code.modifiers
        lanes = {t.lane for t in active}
        if not active or name in _NOTHING:
            return
        if name == "BSSY":
            self.barriers[operands[0]] = lanes
        elif name == "BSYNC":
            waiting |= dict.fromkeys(lanes, operands[0])
            self._release(operands[0], at, waiting)
        elif name == "BREAK":
            self.barriers[operands[-1]] -= lanes
        elif name == "EXIT":
            for lane in lanes:
                del at[lane]
            for barrier in set(waiting.values()):
                self._release(barrier, at, waiting)
        elif name in ("BRA", "CALL"):
            target = self.labels[operands.pop().strip("`()")]
            # BRA.DIV asks whether lanes are missing: they never are where all arrive together.
            divergent = "DIV" in modifiers
            for t in active:
                if not divergent and all(t.predicate(x) for x in operands if _is_predicate(x)):
                    at[t.lane] = target
        elif name == "RET":
            for t in active:
                at[t.lane] = t.value(operands[0].split()[0])
        elif name in ("VOTE", "VOTEU"):
            _vote(active, modifiers, operands)
        elif name == "SHFL":
            _shfl(self.threads, active, modifiers, operands)
        else:
            uniform = name in ("R2UR", "S2UR") or name[0] == "U"
            plain = name[1:] if name[0] == "U" else name
            if plain not in _EXECUTE:
                raise NotImplementedError(f"{code.opcode} at {code.address:#x}: the opcode is not known")
            for t in active[:1] if uniform else active:
                _EXECUTE[plain](t, modifiers, operands)

    def _release(self, barrier: str, at: dict[int, int], waiting: dict[int, str]) -> None:
        """Lets lanes go on that have all arrived."""
        expected = {lane for lane in self.barriers.get(barrier, set()) if lane in at}
        if expected <= {lane for lane, name in waiting.items() if name == barrier}:
            for lane in [lane for lane, name in waiting.items() if name == barrier]:
                del waiting[lane]


def _vote(active: list[Thread], modifiers: list[str], operands: list[str]) -> None:
    ballot = sum(t.predicate(operands[-1]) << t.lane for t in active)
    everyone = sum(1 << t.lane for t in active)
    holds = {"ANY": ballot != 0, "ALL": ballot == everyone, "EQ": ballot in (0, everyone)}[modifiers[0]]
    for t in active:
        for out in operands[:-1]:
            if _is_predicate(out):
                t.set_predicate(out, holds)
            else:
                t.put(out, ballot)


def _shfl(threads: list[Thread], active: list[Thread], modifiers: list[str], operands: list[str]) -> None:
    valid, to, what, by, _ = operands
    values = [t.value(what) for t in threads]
    results = []
    for t in active:
        offset = t.value(by)
        move = {"BFLY": t.lane ^ offset, "IDX": offset & 31, "UP": t.lane - offset, "DOWN": t.lane + offset}
        lane = move[modifiers[0]]
        results.append((t, 0 <= lane < 32, values[lane] if 0 <= lane < 32 else values[t.lane]))
    for t, there, value in results:
        t.set_predicate(valid, there)
        t.put(to, value)

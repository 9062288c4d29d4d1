"""Reads the text of a compiled program (`compiled.as_text()`): what runs how often, and what only moves data."""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.<>-]+) \(.*\{\s*$")
# Tuples of tuples of arrays, whose layouts have parentheses of their own.
_TUPLE = r"\([^()]*\)"
for _ in range(3):
    _TUPLE = rf"\((?:[^()]|{_TUPLE})*\)"
_INSTRUCTION = re.compile(rf"^\s+(ROOT )?%?([\w.<>-]+) = ({_TUPLE}|\S+) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.<>-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

_SCOPED_VMEM = re.compile(r'\{"memory_space":"1","offset":"\d+","size":"(\d+)"\}')

_MOVES = frozenset({"copy", "transpose", "reshape", "pad", "concatenate", "slice"})
_SCALAR_BYTES = 8
# What runs no code of its own; asynchronous copies are DMAs, and XLA's own custom calls join their results.
_NO_LAUNCH = frozenset(
    {
        "parameter",
        "constant",
        "bitcast",
        "tuple",
        "get-tuple-element",
        "while",
        "call",
        "conditional",
        "custom-call",
    }
)
_COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(mesh\[[^\]]*\] *\{[^}]*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{(?:\{[\d,]*\},?)*\})"
)
_ORIGIN = re.compile(r'op_name="([^"]*)"')
# Of the three fusions that start, carry on and end one asynchronous exchange of a TPU.
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
# What a fusion may hold besides and still compute nothing.
_INERT = frozenset({"parameter", "constant", "bitcast", "tuple", "get-tuple-element"})


class Instruction(NamedTuple):
    """One instruction; `bytes` of its result, tile padding not included."""

    name: str
    opcode: str
    bytes: int
    shape: str
    rest: str


class Moved(NamedTuple):
    """An instruction that computes nothing and moves data: bytes of its result, and how often it runs."""

    name: str
    opcode: str
    bytes: int
    calls: int


class Collective(NamedTuple):
    """An exchange between devices: its result on one of them, and how often it runs.

    `groups` is as in the text: which devices exchange with each other. A reduce-scatter that the TPU compiler
    makes of an all-reduce and a slice counts as that.
    """

    kind: str
    groups: str
    # Element type and number of elements of each array of the result.
    arrays: tuple[tuple[str, int], ...]
    bytes: int
    calls: int
    # What of the traced program it comes from.
    origin: str


class Calls(NamedTuple):
    """How often the program runs each instruction that launches something.

    `unknown_loops` count once: their number of turns is not known.
    """

    counts: dict[str, int]
    # Equal for launches that share their code: the compiler makes it once.
    fingerprints: dict[str, str]
    # Results of a few bytes: the scalar unit computes them between the launches.
    scalars: set[str]
    unknown_loops: list[str]


def _array_bytes(shape: str) -> int:
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        size = int(bits[0]) if bits and dtype != "pred" else 8
        for dim in dims.split(","):
            size *= int(dim) if dim else 1
        total += size // 8
    return total


def _computations(compiled_text: str) -> tuple[str, dict[str, list[Instruction]]]:
    entry, current, computations = "", None, {}
    for line in compiled_text.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith(" "):
            current = computations.setdefault(header[2], [])
            if header[1]:
                entry = header[2]
        elif line.startswith("}"):
            current = None
        elif current is not None and (parsed := _INSTRUCTION.match(line)):
            _, name, shape, opcode, rest = parsed.groups()
            current.append(Instruction(name, opcode, _array_bytes(shape), shape, rest))
    if not entry:
        raise ValueError("compiled_text must be the text of a compiled program; it has no ENTRY computation.")
    return entry, computations


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and 'target="tpu_custom_call"' in instruction.rest


def _called(instruction: Instruction) -> list[str]:
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += [name.strip().removeprefix("%") for name in branches.split(",")]
    return names


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.<>-]+)", instruction.rest.split(")")[0])


def _constant(name: str, defined: dict[str, Instruction]) -> int | None:
    """The integer that a name stands for, through copies; None if it is not a constant."""
    while name in defined:
        instruction = defined[name]
        if instruction.opcode == "constant":
            value = re.match(r"(-?\d+)\)", instruction.rest)
            return int(value[1]) if value else None
        if instruction.opcode not in ("copy", "bitcast"):
            return None
        name = _operands(instruction)[0]
    return None


def _trips(
    loop: Instruction, around: dict[str, Instruction], computations: dict[str, list[Instruction]]
) -> int | None:
    """Turns of a loop: as XLA found them, or from `i < constant`, as JAX writes its scans, in steps of one."""
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.<>-]+)", loop.rest)
    inside = {x.name: x for x in computations.get(condition[1], ())} if condition else {}
    for compare in inside.values():
        if compare.opcode != "compare" or "direction=LT" not in compare.rest:
            continue
        left, right = _operands(compare)
        index = re.search(r"index=(\d+)", inside[left].rest if left in inside else "")
        limit = _constant(right, inside)
        start_of_all = around.get(_operands(loop)[0])
        if index and limit is not None and start_of_all is not None and start_of_all.opcode == "tuple":
            start = _constant(_operands(start_of_all)[int(index[1])], around)
            return None if start is None else max(0, limit - start)
    return None


def _fingerprint(
    instruction: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]
) -> str:
    attributes = re.sub(r", metadata=\{[^}]*\}|, sharding=\{.*?\}(?=,|$)", "", instruction.rest)
    parts = [instruction.opcode, instruction.shape]
    parts += [shapes.get(name, "") for name in _operands(instruction)]
    parts.append(re.sub(r"%[\w.<>-]+", "%", attributes))
    for name in _called(instruction):
        body = computations.get(name, [])
        inside = {x.name: x.shape for x in body}
        parts += [_fingerprint(x, inside, computations) for x in body]
    return " ".join(parts)


def _executed(
    compiled_text: str,
) -> tuple[list[tuple[Instruction, int]], list[str], dict[str, list[Instruction]]]:
    """Every instruction outside fusions with its number of runs; each branch of a conditional counts."""
    entry, computations = _computations(compiled_text)
    executed, unknown, todo = [], [], [(entry, 1)]
    while todo:
        name, calls = todo.pop()
        defined = {x.name: x for x in computations.get(name, ())}
        for instruction in defined.values():
            executed.append((instruction, calls))
            inner = calls
            if instruction.opcode == "while":
                trips = _trips(instruction, defined, computations)
                if trips is None:
                    unknown.append(instruction.name)
                inner *= 1 if trips is None else trips
            if instruction.opcode in ("while", "call", "conditional"):
                todo += [(called, inner) for called in _called(instruction)]
    return executed, unknown, computations


def count_calls(compiled_text: str) -> Calls:
    """How often each launch of a compiled program runs.

    Raises:
        ValueError: not the text of a compiled program.
    """
    executed, unknown, computations = _executed(compiled_text)
    shapes = {x.name: x.shape for x, _ in executed}
    launched = [
        (x, calls)
        for x, calls in executed
        if _is_kernel(x) or (x.opcode not in _NO_LAUNCH and not x.opcode.endswith(("-start", "-done")))
    ]
    return Calls(
        counts={x.name: calls for x, calls in launched},
        fingerprints={x.name: _fingerprint(x, shapes, computations) for x, _ in launched},
        scalars={x.name for x, _ in launched if x.bytes <= _SCALAR_BYTES},
        unknown_loops=unknown,
    )


def kernel_vmem(compiled_text: str) -> dict[str, int]:
    """The Pallas TPU kernels of a program by name, and the VMEM bytes that the compiler gave each.

    Windows, scratch and spills; not operands that XLA itself keeps in VMEM.
    """
    executed, _, _ = _executed(compiled_text)
    return {
        x.name: sum(map(int, _SCOPED_VMEM.findall(x.rest.partition('"used_scoped_memory_configs"')[2])))
        for x, _ in executed
        if _is_kernel(x)
    }


def collectives(compiled_text: str) -> list[Collective]:
    """The exchanges between devices of a compiled program, the largest total (bytes × calls) first.

    Raises:
        ValueError: not the text of a compiled program, or one with exchanges where this reader does not look.
    """
    executed, _, computations = _executed(compiled_text)
    found, chains, looked_at = [], set(), set()
    for instruction, calls in executed:
        for around, part in _with_bodies(instruction, computations):
            if (kind := _collective_kind(part)) is None:
                continue
            looked_at.add(part.name)
            if chain := _CHAIN.search(part.rest):
                if chain.groups() in chains:
                    continue
                chains.add(chain.groups())
            result = part
            if kind == "all-reduce" and any("all-reduce-scatter" in name for name in _called(around)):
                kind, result = "reduce-scatter", around
            arrays = tuple(
                (dtype, math.prod(int(dim) for dim in dims.split(",") if dim))
                for dtype, dims in _ARRAY.findall(result.shape)
            )
            if part.opcode in ("all-gather-start", "collective-permute-start"):
                # Operands come first, and of a permute two words last.
                arrays = arrays[: 2 * (len(arrays) // 2)] if kind == "all-gather" else arrays[:2]
                arrays = arrays[len(arrays) // 2 :]
            groups, origin = _GROUPS.search(part.rest), _ORIGIN.search(part.rest)
            size = sum(_array_bytes(f"{dtype}[{count}]") for dtype, count in arrays)
            found.append(
                Collective(
                    kind, groups[1] if groups else "{}", arrays, size, calls, origin[1] if origin else ""
                )
            )
    everywhere = {x.name for body in computations.values() for x in body if _collective_kind(x)}
    if missed := sorted(everywhere - looked_at):
        raise ValueError(f"exchanges in computations that nothing was seen to call: {', '.join(missed[:4])}.")
    return sorted(found, key=lambda x: -x.bytes * x.calls)


def _collective_kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in _COLLECTIVES else None


def _with_bodies(
    instruction: Instruction, computations: dict[str, list[Instruction]]
) -> list[tuple[Instruction, Instruction]]:
    """The instruction, or what it hides: (fusion or call around it, instruction). A TPU's SparseCores are called."""
    if instruction.opcode not in ("fusion", "async-start", "call-start"):
        return [(instruction, instruction)]
    pairs = []
    for name in _called(instruction):
        for part in computations.get(name, ()):
            inner = _with_bodies(part, computations)
            pairs += [(instruction if around is part else around, x) for around, x in inner]
    return pairs


def moved_bytes(compiled_text: str, at_least: int) -> list[Moved]:
    """What XLA moves without computing: copies, transposes, pads, and fusions of nothing else.

    Reshapes that are bitcasts cost nothing and are not listed; neither are copy-start and copy-done, with
    which XLA fetches an operand to VMEM ahead of its use.

    Args:
        compiled_text: `compiled.as_text()` of any platform.
        at_least: bytes; smaller results are left out.

    Returns:
        the instructions in question, the largest total (bytes × calls) first.

    Raises:
        ValueError: not the text of a compiled program.
    """
    executed, _, computations = _executed(compiled_text)
    moved = []
    for instruction, calls in executed:
        opcodes = {instruction.opcode}
        if instruction.opcode == "fusion":
            opcodes = {x.opcode for name in _called(instruction) for x in computations.get(name, ())}
            # A pad's or a broadcast's constant does not make it arithmetic.
            opcodes -= _INERT
        if instruction.bytes >= at_least and opcodes and opcodes <= _MOVES:
            moved.append(Moved(instruction.name, instruction.opcode, instruction.bytes, calls))
    return sorted(moved, key=lambda x: -x.bytes * x.calls)

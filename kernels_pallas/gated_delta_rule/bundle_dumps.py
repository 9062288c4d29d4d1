"""Reads what the TPU compiler dumps of a launch, and counts how often each of its VLIW bundles runs.

A launch is one kernel, or one fusion or copy of XLA. `…-final_bundles.txt` holds its bundles with their
control flow, `…-final_hlo-static-per-bundle-utilization.txt` the slots that each of them fills. The grid loop
and other loops stay rolled there, so a static count says little: `run_counts` runs the scalar part of the
program instead (loop counters, grid indices, predicates) and leaves the vector part and memory unknown.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:[\s>]*\{")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"(Start|End|Start/End empty) region (\d+)")
_BRANCH = re.compile(r"%(\w+) = sbr\.rel (?:\((!?)%(\w+)\) )?\s*target = \$region(\d+)")
_INSTRUCTION = re.compile(r"%(\w+) = ([a-z_][\w.]*)\s*(.*)", re.DOTALL)
_PREDICATE = re.compile(r"\((!?)%(\w+)(?:, ([^()]+))?\),?\s*")
_STATIC_ADDRESS = re.compile(r"\[smem:\[(#allocation\w+(?: \+ \$0x[0-9a-f]+)?)\]\]")
_CORE_INDEX = re.compile(r"(#allocation\d+) \[.*core index'\]")
_VMEM = re.compile(r"#allocation\w+ \[.*space=vmem, size = 0x([0-9a-f]+), .*?tag = '([^'.]*)")

# More bundles than any launch of minutes runs: what does not end before is a loop misread.
_MOST_BUNDLES = 50_000_000

type _Value = int | None
type _Memory = dict[str, _Value]
type _Action = Callable[[_Memory, _Memory], None]


class Branch(NamedTuple):
    """A branch, taken where its predicate (None: always) holds, or does not hold if `negated`."""

    predicate: str | None
    negated: bool
    target: int
    # Bundles after the branch that still run before it takes effect.
    delay: int


class Program(NamedTuple):
    """The scalar part of a launch, bundle by bundle."""

    actions: tuple[tuple[_Action, ...], ...]
    # Target, value from before the loop, value from the iteration before.
    phis: tuple[tuple[tuple[str, str, str], ...], ...]
    branches: tuple[Branch | None, ...]
    # Where the index of the core lies, None if the launch never asks for it.
    core_index: str | None


class Runs(NamedTuple):
    """How often each bundle runs, and what had to be assumed where the scalar part does not decide."""

    counts: list[int]
    assumptions: list[str]


class Slots(NamedTuple):
    """Slot names, how many of each a bundle has, and how many each bundle fills."""

    names: list[str]
    capacity: list[int]
    rows: list[list[int]]


def _signed(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _unsigned(value: int) -> int:
    return value % (1 << 32)


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda x, by: x << (by % 32),
    "sshrl": lambda x, by: _unsigned(x) >> (by % 32),
    "sshra": lambda x, by: x >> (by % 32),
    "smin": min,
    "smax": max,
}
_LOGIC: dict[str, Callable[[int, int], int]] = {
    "por": operator.or_,
    "pand": operator.and_,
    "pxor": operator.xor,
    "pnand": lambda x, y: 1 - (x & y),
    "pnor": lambda x, y: 1 - (x | y),
}
# The operand that decides alone, whatever the other is.
_DECIDES = {"por": 1, "pand": 0, "pnand": 0, "pnor": 1}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "eq": operator.eq,
    "ne": operator.ne,
}


def _operation(name: str) -> Callable[[list[_Value]], _Value]:
    """The meaning of a scalar or predicate operation; unknown ones give unknown values."""
    base, *kinds = name.split(".")

    def compute(x: list[_Value]) -> _Value:
        if base in _LOGIC and len(x) == 2:
            left, right = x
            if left is None or right is None:
                decides = _DECIDES.get(base)
                if decides is None or decides not in (left, right):
                    return None
                left = right = decides
            return _LOGIC[base](left, right)
        known = [y for y in x if y is not None]
        if len(known) != len(x):
            return None
        if base in ("smov", "pmov") and len(known) == 1:
            return known[0]
        if base == "pneg" and len(known) == 1:
            return 1 - known[0]
        if len(known) == 2 and base in (_ARITHMETIC.keys() | {"scmp"}):
            domain = _unsigned if "u32" in kinds else _signed
            left, right = map(domain, known)
            if base == "scmp":
                return int(_COMPARISONS[kinds[0]](left, right)) if kinds[0] in _COMPARISONS else None
            return _signed(_ARITHMETIC[base](left, right))
        return None

    return compute


def _value(operand: str, values: _Memory) -> _Value:
    operand = operand.strip()
    if operand.startswith("%"):
        return values.get(operand[1:])
    return _signed(int(operand)) if re.fullmatch(r"-?\d+", operand) else None


def _action(target: str, name: str, operands: str) -> _Action | None:
    """What one instruction does to scalar values and scalar memory; None for the vector part."""
    if name in ("sld", "sst"):
        address = _STATIC_ADDRESS.match(operands)
        key = address[1] if address else None
        if name == "sld":

            def load(values: _Memory, memory: _Memory) -> None:
                values[target] = None if key is None else memory.get(key)

            return load
        source = operands.rsplit(" ", 1)[-1]
        predicated = "(" in (operands[address.end() :] if address else operands)

        def store(values: _Memory, memory: _Memory) -> None:
            if key is not None:
                memory[key] = None if predicated else _value(source, values)
                return
            # It may have hit anything but the compiler's own spills.
            for other in list(memory):
                if not other.endswith("_spill"):
                    memory[other] = None

        return store
    if target[0] not in "sp" or name.endswith("phi"):
        return None
    if name == "scalar_select":
        predicate, on_true, on_false = operands.split(",")

        def select(values: _Memory, memory: _Memory) -> None:
            chosen = _value(predicate, values)
            values[target] = None if chosen is None else _value(on_true if chosen else on_false, values)

        return select
    predicate = _PREDICATE.match(operands)
    compute = _operation(name)
    inputs = [x for x in operands[predicate.end() if predicate else 0 :].split(",") if x.strip()]
    if predicate is not None and predicate[3] is not None:
        # smov (%p, %old), new: the register keeps its old value where the predicate does not hold.
        negated, which, old = predicate.groups()

        def move(values: _Memory, memory: _Memory) -> None:
            chosen = values.get(which)
            if chosen is None:
                values[target] = None
            elif bool(chosen) != bool(negated):
                values[target] = compute([_value(x, values) for x in inputs])
            else:
                values[target] = _value(old, values)

        return move

    # A predicated value is read only where its predicate holds.
    def assign(values: _Memory, memory: _Memory) -> None:
        values[target] = compute([_value(x, values) for x in inputs])

    return assign


def _split(text: str) -> list[tuple[str | None, str]]:
    """Label and text of each bundle; comments may run over several lines."""
    bundles: list[tuple[str | None, list[str]]] = []
    for line in text.splitlines():
        start = _BUNDLE.match(line)
        if start:
            bundles.append((start[1], [line[start.end() :]]))
        elif bundles:
            bundles[-1][1].append(line)
    return [(label, "\n".join(lines)) for label, lines in bundles]


def _regions_of_branches(allocations: str) -> dict[str, str]:
    region, regions = "", {}
    for line in allocations.splitlines():
        header = re.match(r"\s*\$region(\d+)[: ]", line)
        branch = re.match(r"\s*%(\w+) = sbr", line)
        if header:
            region = header[1]
        elif branch:
            regions[branch[1]] = region
    return regions


def parse_program(bundles: str, allocations: str) -> Program:
    """The scalar part of a launch.

    Args:
        bundles: text of `…-final_bundles.txt`.
        allocations: text of `…-pre-finalize-registers-and-allocations.txt` of the same launch.

    Raises:
        ValueError: no bundles in the text, or a branch to a region that it does not have.
    """
    split = _split(bundles)
    if not split:
        raise ValueError("bundles must be the text of a …-final_bundles.txt; it holds no bundle.")
    starts, ends = {}, {}
    for index, (_, text) in enumerate(split):
        for kind, region in _REGION.findall(text):
            if kind != "End":
                starts.setdefault(region, index)
            if kind != "Start":
                ends[region] = index
    # A region that only leaves the launch has become its exit bundle, without its number.
    last = len(split) - 1 if "exit bundle" in split[-1][1] and split[-1][0] == "PF" else None
    of_branch = _regions_of_branches(allocations)
    core_index = _CORE_INDEX.search(allocations)
    actions, phis, branches = [], [], []
    reads_core = False
    for index, (label, text) in enumerate(split):
        here, here_phis, branch = [], [], None
        for instruction in _COMMENT.sub("", text).split(";;"):
            parsed = _INSTRUCTION.search(instruction)
            jump = _BRANCH.search(instruction)
            if jump:
                name, negated, predicate, region = jump.groups()
                to = starts.get(region, last)
                if to is None:
                    raise ValueError(f"branch to region {region}, which is not in the text.")
                # Its block ends with the delay slots. Where tpu7x names no end, one slot follows.
                end = ends.get(of_branch.get(name, ""), -1)
                delay = end - index if end > index else 1
                branch = Branch(predicate, negated == "!", to, delay)
            elif parsed:
                target, name, operands = parsed[1], parsed[2], parsed[3].strip().rstrip("} \n")
                if name == "sphi":
                    if label == "LB":
                        before, again = (x.strip()[1:] for x in operands.split(","))
                        here_phis.append((target, before, again))
                    continue
                if core_index and name == "sld" and core_index[1] + "]" in operands:
                    reads_core = True
                action = _action(target, name, operands)
                if action is not None:
                    here.append(action)
        actions.append(tuple(here))
        phis.append(tuple(here_phis))
        branches.append(branch)
    core = core_index[1] if core_index and reads_core else None
    return Program(tuple(actions), tuple(phis), tuple(branches), core)


def run_counts(program: Program, core: int = 0) -> Runs:
    """How often each bundle runs on one core, in bundles.

    Where a predicate hangs on data, a region counts as run and a loop as run once; each such branch is one
    of the assumptions.

    Raises:
        RuntimeError: no end in sight; the program was misread.
    """
    size = len(program.actions)
    counts = [0] * size
    values: _Memory = {}
    memory: _Memory = {} if program.core_index is None else {program.core_index: core}
    assumed = Counter()
    at, jump, jump_after, again, steps = 0, 0, -1, False, 0
    while at < size:
        steps += 1
        if steps > _MOST_BUNDLES:
            raise RuntimeError(f"a launch of more than {_MOST_BUNDLES} bundles; its loops were misread.")
        counts[at] += 1
        if program.phis[at]:
            new = [(target, values.get(y if again else x)) for target, x, y in program.phis[at]]
            values.update(new)
        for action in program.actions[at]:
            action(values, memory)
        branch = program.branches[at]
        if branch is not None:
            holds = 1 if branch.predicate is None else values.get(branch.predicate)
            if holds is None:
                kind = "a region counts as run" if branch.target > at else "a loop counts as run once"
                assumed[f"bundle {at:#x}: {kind}, its condition depends on data"] += 1
            elif bool(holds) != branch.negated:
                jump, jump_after = branch.target, at + branch.delay
        again = False
        if at == jump_after:
            again = jump <= at
            at, jump_after = jump, -1
        else:
            at += 1
    return Runs(counts, list(assumed))


def parse_slots(text: str) -> Slots:
    """The slots, from the text of `…-final_hlo-static-per-bundle-utilization.txt`.

    Raises:
        ValueError: another layout than title, names, capacities, title, one row per bundle.
    """
    lines = text.splitlines()
    try:
        names = [name.strip() for name in lines[1].split(",")]
        capacity, *rows = ([int(x) for x in line.split()] for line in [lines[2], *lines[4:]] if line.strip())
    except (IndexError, ValueError) as error:
        raise ValueError(f"not the text of a …-static-per-bundle-utilization.txt: {error}") from error
    if any(len(row) != len(names) for row in [capacity, *rows]):
        raise ValueError(f"every row must have {len(names)} figures, one for each of {names}.")
    return Slots(names, capacity, rows)


def vmem_bytes(allocations: str) -> dict[str, int]:
    """VMEM that a kernel asks for, bytes by purpose, from its `…-registers-and-allocations.txt`.

    Windows of the operands (both buffers) and scratch. Spills are not there yet; operands that XLA itself
    keeps in VMEM have no window; the compiler's internal scratch is the same for every kernel.
    """
    found: dict[str, int] = {}
    for size, tag in _VMEM.findall(allocations):
        purpose = re.sub(r" (for operator )?(in|out)put \d+$| for .*", "", tag)
        purpose = purpose.replace("window allocation", "windows")
        # All ones where the size is not known.
        if purpose != "internal scratch" and int(size, 16) < 1 << 63:
            found[purpose] = found.get(purpose, 0) + int(size, 16)
    return found

"""The optimized HLO of a compiled function, parsed into instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jax.stages import Compiled

NO_WORK = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call")


@dataclass(frozen=True)
class Instruction:
    """One instruction of an optimized program."""

    computation: str  # the one it is in
    name: str
    shape: str  # of the result, as XLA writes it: "bf16[64,768]{1,0}", or a tuple of such
    opcode: str
    arguments: str  # operands, or the number of a parameter
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it uses."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


class Program:
    """The optimized HLO of a compiled function, instruction by instruction."""

    # The metadata of TPU kernels is the only text with line breaks inside an instruction.
    METADATA = re.compile(r"kernel_metadata=\{\s+(?:\".*\s+)*\}")

    def __init__(self, compiled: Compiled):
        self.computations: dict[str, dict[str, Instruction]] = {}
        lines = self.METADATA.sub(lambda x: x[0].replace("\n", ""), compiled.as_text())
        for text in re.split(r"\n(?=\S)", lines):
            head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{", text)
            if head:
                found = self._instructions(head[1], text)
                self.computations[head[1]] = {each.name: each for each in found}
        # Computations called by other instructions: their intermediate results stay out of memory.
        inside = r"(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)"
        self.fused = {
            name
            for each in self
            if each.opcode in ("fusion", "reduce", "scatter", "all-reduce", "all-reduce-start")
            for name in re.findall(inside, each.attributes)
        }

    @staticmethod
    def _instructions(computation: str, text: str) -> Iterator[Instruction]:
        shape = r"\((?:[^()]|\([^()]*\))*\)|\S+"
        line = re.compile(
            rf"^\s+(?:ROOT )?%?([\w.\-]+) = ({shape}) ([\w\-]+)\((.*?)\)(.*)$", re.MULTILINE
        )
        for fields in line.findall(text):
            yield Instruction(computation, *fields)

    def __iter__(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def kernels(self) -> list[Instruction]:
        """Return what is launched: instructions outside fused computations that do work."""
        return [x for x in self if x.computation not in self.fused and x.opcode not in NO_WORK]

    def loops(self) -> list[list[Instruction]]:
        """Return what each loop launches per iteration, the longest loop first."""
        found = []
        for body in (name for x in self for name in re.findall(r"body=%?([\w.\-]+)", x.attributes)):
            inside, before = {body}, set()
            while inside != before:
                before = set(inside)
                for each in self:
                    if each.computation in before:
                        called = r"(?:calls|to_apply|body)=%?([\w.\-]+)"
                        inside.update(re.findall(called, each.attributes))
            found.append([x for x in self.kernels() if x.computation in inside])
        return sorted(found, key=len, reverse=True)

    def bytes_moved(self, kernel: Instruction) -> int:
        """Return the bytes that a kernel reads and writes, if nothing stays in a cache."""
        scope = self.computations[kernel.computation]
        read = [size_of(scope[name].shape) for name in kernel.operands]
        fused = re.search(r"calls=%?([\w.\-]+)", kernel.attributes)
        if kernel.opcode == "fusion" and fused:
            inside = self.computations[fused[1]]
            for parameter in inside.values():
                if parameter.opcode == "parameter":
                    # Operands that are only sliced or gathered from are read only in part.
                    users = self._users(inside, parameter.name)
                    if all("slice" in x.opcode or x.opcode == "gather" for x in users):
                        some = sum(size_of(x.shape) for x in users)
                        read[int(parameter.arguments)] = min(some, size_of(parameter.shape))
        return size_of(kernel.shape) + sum(read)

    def _users(self, scope: dict[str, Instruction], name: str) -> list[Instruction]:
        """Return the instructions that use a result, also through bitcasts."""
        users = [x for x in scope.values() if name in x.operands]
        seen = [[x] if x.opcode != "bitcast" else self._users(scope, x.name) for x in users]
        return list(chain.from_iterable(seen))


def size_of(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple, in HLO's notation."""
    total = 0
    for kind, bits, dimensions in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape):
        items = int(np.prod([int(n) for n in dimensions.split(",") if n]))
        total += items * (1 if kind == "pred" else int(bits) // 8)
    return total

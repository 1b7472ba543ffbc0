"""Translates PTX, as nvcc writes it, into C++ for the fiber run-time: every kernel becomes a function that one thread runs.

Only what is listed here is translated. An unknown opcode, modifier, register or directive raises Unsupported, with the line of
PTX: nothing is ever dropped. Semantics are those of the PTX ISA (docs.nvidia.com/cuda/parallel-thread-execution), section
"Instruction Set"; ptx_kernel.h holds the operations themselves.

    python ptx.py kernel.ptx kernel.cpp [--allow-contraction]
"""

import re
import sys
from pathlib import Path

BITS = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)} | {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
SPACES = ("global", "shared", "local", "const", "param")
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
SPECIAL = {
    **{f"%{name}.{axis}": f"current.{field}.{axis}" for name, field in
       {"tid": "thread", "ntid": "block_size", "ctaid": "block", "nctaid": "grid_size"}.items() for axis in "xyz"},
    "%laneid": "current.lane",
    "%warpid": "current.warp",
    "%lanemask_eq": "(1u << current.lane)",
    "%lanemask_lt": "((1u << current.lane) - 1u)",
    "%lanemask_le": "((2u << current.lane) - 1u)",
    "%lanemask_ge": "~((1u << current.lane) - 1u)",
    "%lanemask_gt": "~((2u << current.lane) - 1u)",
    "%dynamic_smem_size": "dynamic_shared_bytes()",
    "WARP_SZ": "32u",
}  # fmt: skip


class Unsupported(Exception):
    """PTX that this translator does not know."""


def ctype(kind):
    """The C++ type of a PTX type. Halves are their bits."""
    if kind in ("f32", "f64"):
        return {"f32": "float", "f64": "double"}[kind]
    if kind == "pred":
        return "bool"
    return f"{'' if kind[0] == 's' else 'u'}int{BITS[kind]}_t"


def is_float(kind):
    return kind in ("f32", "f64")


def identifier(name):
    return re.sub(r"\W", "_", name)


def split_operands(text):
    """Splits at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def elements(operand):
    """The registers of a vector operand, or the one operand."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


class Instruction:
    """One instruction; modifiers are taken away as they are understood."""

    def __init__(self, text):
        match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", text, re.DOTALL)
        if match is None:
            raise Unsupported("not an instruction")
        self.negated, self.guard, self.name, operands = (match[1] == "!", match[2], match[3], match[4] or "")
        self.opcode, *self.modifiers = self.name.split(".")
        self.operands = split_operands(operands)

    def take(self, *names):
        """The one of `names` that stands there, removed; else None."""
        found = next((m for m in self.modifiers if m in names), None)
        if found is not None:
            self.modifiers.remove(found)
        return found

    def need(self, *names):
        found = self.take(*names)
        if found is None:
            raise Unsupported(f"none of .{', .'.join(names)}")
        return found

    def type(self, *allowed):
        """The last modifier, which must be a type (one of `allowed`, if given)."""
        kind = self.modifiers.pop() if self.modifiers else None
        if kind not in (allowed or (*BITS, "pred")):
            raise Unsupported(f"type {kind}")
        return kind

    def done(self, *operand_counts):
        if self.modifiers:
            raise Unsupported(f"modifier .{self.modifiers[0]}")
        if operand_counts and len(self.operands) not in operand_counts:
            raise Unsupported(f"{len(self.operands)} operands")
        return self.operands


class Function:
    """Translates one .entry or .func."""

    def __init__(self, module, name, is_entry):
        self.module, self.name, self.is_entry = module, name, is_entry
        self.symbols = [{}]  # scopes: name -> ("reg", C name) | ("param", pointer) | ("local", array)
        self.declarations, self.code, self.tables = [], [], {}
        self.site = ("", 0)
        self.params = []  # (offset or C name, bytes)

    # ---- names and operands

    def declare(self, name, entry):
        self.symbols[-1][name] = entry

    def lookup(self, name):
        return next((scope[name] for scope in reversed(self.symbols) if name in scope), None)

    def register(self, name):
        found = self.lookup(name)
        if found is None or found[0] != "reg":
            raise Unsupported(f"operand {name}")
        return found[1]

    def pointer(self, name):
        """C++ expression for the address of a variable, as a generic 64-bit one; None for other names."""
        found = self.lookup(name)
        if found is not None and found[0] in ("param", "local"):
            return f"reinterpret_cast<uint64_t>({found[1]})"
        if name in self.module.shared:
            return None
        return f"reinterpret_cast<uint64_t>({self.module.variables[name]})" if name in self.module.variables else None

    def raw(self, operand):
        """C++ expression of an operand's bits."""
        if operand in SPECIAL:
            return SPECIAL[operand]
        if self.lookup(operand) is not None and self.lookup(operand)[0] == "reg":
            return self.register(operand)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return f"0x{operand[2:]}u"
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return f"0x{operand[2:]}ull"
        if match := re.fullmatch(r"([\w$%.]+)\s*\+\s*(\d+)", operand):
            return f"({self.raw(match[1])} + {match[2]})"
        if operand in self.module.shared:
            return f"uint64_t{{{self.module.shared_offset(self, operand)}}}"
        if (pointer := self.pointer(operand)) is not None:
            return pointer
        raise Unsupported(f"operand {operand}")

    def read(self, operand, kind):
        """C++ expression of an operand, as a value of PTX type `kind`."""
        if kind == "pred":
            if operand.startswith("!"):
                return f"!{self.register(operand[1:])}"
            return {"0": "false", "1": "true", "-1": "true"}.get(operand) or self.register(operand)
        if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            value = int(match[2], 16 if match[2][:2] in ("0x", "0X") else 8 if re.match("0[0-7]", match[2]) else 10) * (-1 if match[1] else 1)
            return f"as<{ctype(kind)}>({value & (1 << 64) - 1:#x}ull)"
        return f"as<{ctype(kind)}>({self.raw(operand)})"

    def write(self, operand, expression):
        return "" if operand == "_" else f"set({self.register(operand)}, {expression}); "

    def address(self, operand, space):
        """C++ expression of the address in [register or variable + offset]: an offset in shared memory, or a pointer."""
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if match is None:
            raise Unsupported(f"address {operand}")
        base, offset = match[1], int(match[2] or "0", 0)
        if base in self.module.shared and self.lookup(base) is None:
            if space != "shared":
                raise Unsupported(f"shared variable {base} in another space")
            return f"{self.module.shared_offset(self, base) + offset}u"
        bits = self.raw(base) if not base.isdigit() else f"{base}ull"
        return f"static_cast<uint64_t>({bits}) + ({offset}ll)" if offset else f"static_cast<uint64_t>({bits})"

    def at(self, instruction):
        """C++ name of the instruction's place in the source."""
        return self.module.site((*self.site, instruction.name))

    # ---- body

    def label(self, name):
        return "L" + identifier(name)

    def body(self, statements):
        self.statement_text = ""
        for text in statements:
            self.statement_text = text
            if text == "{":
                self.symbols.append({})
                self.code.append("{")
            elif text == "}":
                self.symbols.pop()
                self.code.append("}")
            elif text.startswith("."):
                self.directive(text)
            elif match := re.match(r"([\w$]+):\s*\.branchtargets\s+(.*)", text, re.DOTALL):
                self.tables[match[1]] = split_operands(match[2])
            elif text.endswith(":"):
                self.code.append(f"{self.label(text[:-1])}:;")
            else:
                self.code.append(self.instruction(text))

    def directive(self, text):
        if match := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            self.site = (self.module.files[match[1]], int(match[2]))
        elif match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL):
            kind = match[1]
            initial = "false" if kind == "pred" else "0"
            for name in split_operands(match[2]):
                many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
                for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                    cname = f"{identifier(one)}_{len(self.symbols)}_{len(self.declarations)}"
                    self.declare(one, ("reg", cname))
                    self.declarations.append(f"{'bool' if kind == 'pred' else f'uint{BITS[kind]}_t'} {cname} = {initial};")
        elif match := re.fullmatch(r"\.(param|local)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$%]+)(?:\[(\d+)\])?", text):
            cname = f"{identifier(match[3])}_{len(self.declarations)}"
            self.declare(match[3], (match[1], cname))
            self.declarations.append(f"alignas(16) uint8_t {cname}[{BITS[match[2]] // 8 * int(match[4] or 1)}];")
        elif re.match(r"\.shared\s+\.align", text):
            pass  # Module.parse has seen it
        elif not re.match(r"\.pragma\s+\"(nounroll|used_bytes_mask \d+)\"", text):
            raise Unsupported("directive")

    def instruction(self, text):
        instruction = Instruction(text)
        handler = getattr(self, "op_" + instruction.opcode, None)
        if handler is None:
            raise Unsupported(f"opcode {instruction.opcode}")
        code = handler(instruction)
        if instruction.guard:
            return f"if ({'!' if instruction.negated else ''}{self.register(instruction.guard)}) {{ {code} }}"
        return f"{{ {code} }}" if ";" in code[:-2] else code

    # ---- control

    def op_bra(self, i):
        i.take("uni")
        return f"goto {self.label(i.done(1)[0])};"

    def op_brx(self, i):
        i.need("idx")
        i.take("uni")
        index, table = i.done(2)
        cases = "".join(f"case {n}: goto {self.label(name)}; " for n, name in enumerate(self.tables[table]))
        return f'switch ({self.read(index, "u32")}) {{ {cases}default: violate_at("brx.idx beyond its table", {self.at(i)}); }}'

    def op_ret(self, i):
        i.take("uni")
        i.done(0)
        return "return;"

    def op_exit(self, i):
        i.done(0)
        if not self.is_entry:
            raise Unsupported("exit in a function")
        return "return;"

    def op_trap(self, i):
        i.done(0)
        return f'violate_at("trap", {self.at(i)});'

    def op_call(self, i):
        i.take("uni")
        operands = i.done(1, 2, 3)
        results = split_operands(operands.pop(0)[1:-1]) if operands[0].startswith("(") else []
        name, arguments = (operands[0], split_operands(operands[1][1:-1]) if len(operands) > 1 else [])
        if name == "__assertfail":
            return f'violate_at("assertion failed", {self.at(i)});'
        if name not in self.module.functions:
            raise Unsupported(f"call of {name}")
        pointers = [self.lookup(argument)[1] for argument in results + arguments]
        return f"{self.module.functions[name]}({', '.join(pointers)});"

    # ---- data movement

    def op_mov(self, i):
        kind = i.type()
        to, source = i.done(2)
        if source.startswith("{"):
            parts = elements(source)
            bits = BITS[kind] // len(parts)
            joined = " | ".join(f"uint{BITS[kind]}_t{{{self.read(part, f'b{bits}')}}} << {n * bits}" for n, part in enumerate(parts))
            return self.write(to, f"as<{ctype(f'b{BITS[kind]}')}>({joined})")
        if to.startswith("{"):
            parts = elements(to)
            bits = BITS[kind] // len(parts)
            value = self.read(source, f"b{BITS[kind]}")
            return "".join(self.write(part, f"static_cast<uint{bits}_t>({value} >> {n * bits})") for n, part in enumerate(parts))
        return self.write(to, self.read(source, kind))

    def op_cvta(self, i):
        i.type("u64", "b64")
        towards = i.take("to")
        space = i.need("global", "shared", "local", "const", "param", "shared::cta")
        to, source = i.done(2)
        value = self.read(source, "u64")
        if space.startswith("shared"):
            value = f"generic_to_shared({value}, {self.at(i)})" if towards else f"shared_to_generic({value})"
        return self.write(to, value)

    def op_isspacep(self, i):
        space = i.need("global", "shared", "local", "const", "shared::cta").split(":")[0]
        to, source = i.done(2)
        return self.write(to, f"in_space(Space::{space}_, {self.read(source, 'u64')})")

    def memory(self, i, loads):
        """Takes space, ordering, cache and vector modifiers: (C++ space, PTX space, strength, elements)."""
        weak = i.take("weak")
        strong = i.take("volatile", "relaxed", *(("acquire",) if loads else ("release",)))
        if strong in ("relaxed", "acquire", "release"):
            i.need("cta", "cluster", "gpu", "sys")
        if weak and strong:
            raise Unsupported("weak and strong")
        space = (i.take(*SPACES, "shared::cta", "param::entry", "param::func") or "generic").split(":")[0]
        constant = i.take("nc") if loads else None
        i.take("ca", "cg", "cs", "lu", "cv", "wb", "wt")
        for hint in (
            "L1::evict_normal",
            "L1::evict_first",
            "L1::evict_last",
            "L1::evict_unchanged",
            "L1::no_allocate",
            "L2::64B",
            "L2::128B",
            "L2::256B",
        ):
            i.take(hint)
        count = int((i.take("v2", "v4", "v8") or "v1")[1:])
        return space, "strong" if strong else "constant" if constant else "weak", count

    def op_ld(self, i):
        kind = i.type()
        space, strength, count = self.memory(i, True)
        to, source = i.done(2)
        registers = elements(to)
        if len(registers) != count:
            raise Unsupported("vector length")
        writes = "".join(self.write(register, f"value[{n}]") for n, register in enumerate(registers))
        if space == "param":
            return f"const auto value = load_param<{ctype(kind)}, {count}>({self.address(source, space)}); {writes}"
        where = f"{self.address(source, space)}, Strength::{strength}, {self.at(i)}"
        return f"const auto value = load<{ctype(kind)}, {count}>(Space::{space}_, {where}); {writes}"

    def op_ldu(self, i):
        return self.op_ld(i)

    def op_st(self, i):
        kind = i.type()
        space, strength, count = self.memory(i, False)
        to, source = i.done(2)
        values = [self.read(value, kind) for value in elements(source)]
        if len(values) != count:
            raise Unsupported("vector length")
        array = f"Vector<{ctype(kind)}, {count}>{{{{{', '.join(values)}}}}}"
        if space == "param":
            return f"store_param<{ctype(kind)}, {count}>({self.address(to, space)}, {array});"
        return f"store<{ctype(kind)}, {count}>(Space::{space}_, {self.address(to, space)}, {array}, Strength::{strength}, {self.at(i)});"

    def atomic(self, i, returns):
        kind = i.type("b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64")
        i.take("relaxed", "acquire", "release", "acq_rel")
        i.take("cta", "gpu", "sys")
        i.take("noftz")
        space = (i.take("global", "shared", "shared::cta") or "generic").split(":")[0]
        operation = i.need("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
        operands = i.done(2 + returns + (operation == "cas"))
        to = operands.pop(0) if returns else "_"
        values = ", ".join(self.read(value, kind) for value in operands[1:])
        name = {"and": "and_", "or": "or_", "xor": "xor_"}.get(operation, operation)
        call = f"atomic<{ctype(kind)}>(Atomic::{name}, Space::{space}_, {self.address(operands[0], space)}, {self.at(i)}, {values})"
        return self.write(to, call) if to != "_" else f"{call};"

    def op_atom(self, i):
        return self.atomic(i, True)

    def op_red(self, i):
        return self.atomic(i, False)

    def op_prefetch(self, i):
        i.take("global", "local")
        i.need("L1", "L2")
        i.done(1)
        return ";"

    def op_membar(self, i):
        i.need("cta", "gl", "sys")
        i.done(0)
        return "fence();"

    def op_fence(self, i):
        i.take("sc", "acq_rel")
        i.need("cta", "gpu", "sys")
        i.done(0)
        return "fence();"

    # ---- arithmetic

    def simple(self, i, kind, count, expression, result=None):
        """write(first operand, expression of the others as {0}, {1}, ...)."""
        to, *sources = i.done(count + 1)
        values = [self.read(source, kind) for source in sources]
        return self.write(to, f"as<{ctype(result or kind)}>({expression.format(*values)})")

    def arithmetic(self, i, symbol):
        kind = i.type()
        if is_float(kind):
            rounding = i.take("rn")
            if rounding is None and not self.module.allow_contraction:
                raise Unsupported("without .rn ptxas may contract it into an fma: compile with -fmad=false")
            return self.simple(i, kind, 2, f"canonical({{0}} {symbol} {{1}})")
        if kind not in ("u16", "s16", "u32", "s32", "u64", "s64"):
            raise Unsupported(f"type {kind}")
        return self.simple(i, f"u{BITS[kind]}", 2, f"static_cast<uint{BITS[kind]}_t>({{0}} {symbol} {{1}})")

    def op_add(self, i):
        return self.arithmetic(i, "+")

    def op_sub(self, i):
        return self.arithmetic(i, "-")

    def op_mul(self, i):
        kind = i.modifiers[-1]
        if is_float(kind):
            return self.arithmetic(i, "*")
        i.type("u16", "s16", "u32", "s32", "u64", "s64")
        part = i.need("lo", "hi", "wide")
        wide = f"{kind[0]}{BITS[kind] * 2}"
        if part == "wide":
            return self.simple(i, kind, 2, f"multiply_wide<{ctype(wide)}>({{0}}, {{1}})", wide)
        return self.simple(i, kind, 2, f"multiply_{part}({{0}}, {{1}})")

    def op_mad(self, i):
        kind = i.type("u16", "s16", "u32", "s32", "u64", "s64")
        part = i.need("lo", "hi", "wide")
        to, a, b, c = i.done(4)
        a, b = self.read(a, kind), self.read(b, kind)
        result = f"{kind[0]}{BITS[kind] * 2}" if part == "wide" else kind
        product = f"multiply_wide<{ctype(result)}>({a}, {b})" if part == "wide" else f"multiply_{part}({a}, {b})"
        unsigned = f"uint{BITS[result]}_t"
        return self.write(to, f"as<{ctype(result)}>(static_cast<{unsigned}>(as<{unsigned}>({product}) + {self.read(c, f'u{BITS[result]}')}))")

    def op_fma(self, i):
        kind = i.type("f32", "f64")
        i.need("rn")
        return self.simple(i, kind, 3, "canonical(std::fma({0}, {1}, {2}))")

    def op_div(self, i):
        kind = i.type("f32", "f64", "u16", "s16", "u32", "s32", "u64", "s64")
        if is_float(kind):
            i.need("rn")
            return self.simple(i, kind, 2, "canonical({0} / {1})")
        return self.simple(i, kind, 2, f"divide({{0}}, {{1}}, {self.at(i)})")

    def op_rem(self, i):
        kind = i.type("u16", "s16", "u32", "s32", "u64", "s64")
        return self.simple(i, kind, 2, f"remainder({{0}}, {{1}}, {self.at(i)})")

    def op_rcp(self, i):
        kind = i.type("f32", "f64")
        i.need("rn")
        return self.simple(i, kind, 1, "canonical(1 / {0})")

    def op_sqrt(self, i):
        kind = i.type("f32", "f64")
        i.need("rn")
        return self.simple(i, kind, 1, "canonical(std::sqrt({0}))")

    def extremum(self, i, name):
        kind = i.type("f32", "f64", "u16", "s16", "u32", "s32", "u64", "s64")
        if is_float(kind):
            return self.simple(i, kind, 2, f"{name}_float({{0}}, {{1}}, {'true' if i.take('NaN') else 'false'})")
        return self.simple(i, kind, 2, f"std::{name}({{0}}, {{1}})")

    def op_min(self, i):
        return self.extremum(i, "min")

    def op_max(self, i):
        return self.extremum(i, "max")

    def op_abs(self, i):
        kind = i.type("f32", "f64", "s16", "s32", "s64")
        return self.simple(i, kind, 1, "std::fabs({0})" if is_float(kind) else "absolute({0})")

    def op_neg(self, i):
        kind = i.type("f32", "f64", "s16", "s32", "s64")
        return self.simple(i, kind, 1, "-{0}" if is_float(kind) else "negate({0})")

    def op_copysign(self, i):
        return self.simple(i, i.type("f32", "f64"), 2, "std::copysign({1}, {0})")

    # ---- bits

    def logic(self, i, symbol, predicate):
        kind = i.type("b16", "b32", "b64", "pred")
        if kind == "pred":
            to, a, b = i.done(3)
            return self.write(to, f"({self.read(a, kind)} {predicate} {self.read(b, kind)})")
        return self.simple(i, kind, 2, f"static_cast<{ctype(kind)}>({{0}} {symbol} {{1}})")

    def op_and(self, i):
        return self.logic(i, "&", "&&")

    def op_or(self, i):
        return self.logic(i, "|", "||")

    def op_xor(self, i):
        return self.logic(i, "^", "!=")

    def op_not(self, i):
        kind = i.type("b16", "b32", "b64", "pred")
        if kind == "pred":
            to, a = i.done(2)
            return self.write(to, f"!{self.read(a, kind)}")
        return self.simple(i, kind, 1, f"static_cast<{ctype(kind)}>(~{{0}})")

    def op_shl(self, i):
        kind = i.type("b16", "b32", "b64")
        to, a, b = i.done(3)
        return self.write(to, f"shift_left({self.read(a, kind)}, {self.read(b, 'u32')})")

    def op_shr(self, i):
        kind = i.type("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")
        to, a, b = i.done(3)
        return self.write(to, f"shift_right({self.read(a, kind)}, {self.read(b, 'u32')})")

    def op_shf(self, i):
        i.type("b32")
        direction, mode = i.need("l", "r"), i.need("wrap", "clamp")
        return self.simple(
            i, "b32", 3, f"funnel_{'left' if direction == 'l' else 'right'}({{0}}, {{1}}, {{2}}, {'true' if mode == 'wrap' else 'false'})"
        )

    def op_bfe(self, i):
        kind = i.type("u32", "s32", "u64", "s64")
        to, a, b, c = i.done(4)
        return self.write(to, f"extract_bits({self.read(a, kind)}, {self.read(b, 'u32')}, {self.read(c, 'u32')})")

    def op_bfi(self, i):
        kind = i.type("b32", "b64")
        to, a, b, c, d = i.done(5)
        return self.write(to, f"insert_bits({self.read(a, kind)}, {self.read(b, kind)}, {self.read(c, 'u32')}, {self.read(d, 'u32')})")

    def op_prmt(self, i):
        i.type("b32")
        return self.simple(i, "b32", 3, "permute_bytes({0}, {1}, {2})")

    def op_lop3(self, i):
        i.type("b32")
        return self.simple(i, "b32", 4, "logic3({0}, {1}, {2}, {3})")

    def op_popc(self, i):
        kind = i.type("b32", "b64")
        return self.simple(i, kind, 1, "static_cast<uint32_t>(__builtin_popcountll({0}))", "u32")

    def op_clz(self, i):
        kind = i.type("b32", "b64")
        return self.simple(i, kind, 1, "leading_zeros({0})", "u32")

    def op_brev(self, i):
        kind = i.type("b32", "b64")
        return self.simple(i, kind, 1, "reverse_bits({0})")

    def op_bfind(self, i):
        kind = i.type("u32", "s32", "u64", "s64")
        shift = i.take("shiftamt")
        return self.simple(i, kind, 1, f"find_bit({{0}}, {'true' if shift else 'false'})", "u32")

    def op_dp4a(self, i):
        b, a = i.type("u32", "s32"), i.type("u32", "s32")
        to, x, y, z = i.done(4)
        signs = f"{'true' if a[0] == 's' else 'false'}, {'true' if b[0] == 's' else 'false'}"
        return self.write(to, f"dot4<{signs}>({self.read(x, 'b32')}, {self.read(y, 'b32')}, {self.read(z, 'b32')})")

    def op_dp2a(self, i):
        b, a = i.type("u32", "s32"), i.type("u32", "s32")
        upper = "true" if i.need("lo", "hi") == "hi" else "false"
        to, x, y, z = i.done(4)
        signs = f"{'true' if a[0] == 's' else 'false'}, {'true' if b[0] == 's' else 'false'}"
        return self.write(to, f"dot2<{signs}>({self.read(x, 'b32')}, {self.read(y, 'b32')}, {self.read(z, 'b32')}, {upper})")

    # ---- comparison and conversion

    def op_setp(self, i):
        kind = i.type()
        joined = i.take("and", "or", "xor")
        comparison = i.need(*COMPARISONS, *(f"{c}u" for c in ("eq", "ne", "lt", "le", "gt", "ge")), "num", "nan")
        to, a, b, *third = i.done(4 if joined else 3)
        a, b = self.read(a, kind), self.read(b, kind)
        if is_float(kind):
            if comparison in ("num", "nan"):
                value = f"({'!' if comparison == 'num' else ''}is_unordered({a}, {b}))"
            elif comparison in ("lo", "ls", "hi", "hs"):
                raise Unsupported(f"comparison {comparison} of floats")
            elif comparison.endswith("u"):
                value = f"(is_unordered({a}, {b}) || {a} {COMPARISONS[comparison[:-1]]} {b})"
            else:
                value = f"(!is_unordered({a}, {b}) && {a} {COMPARISONS[comparison]} {b})"
        elif comparison in COMPARISONS:
            if comparison in ("lo", "ls", "hi", "hs") and kind[0] == "s" or kind[0] == "b" and comparison not in ("eq", "ne"):
                raise Unsupported(f"comparison {comparison} of {kind}")
            value = f"({a} {COMPARISONS[comparison]} {b})"
        else:
            raise Unsupported(f"comparison {comparison} of {kind}")
        negative = f"!{value}"
        if joined:
            operator = {"and": "&&", "or": "||", "xor": "!="}[joined]
            value, negative = (f"({v} {operator} {self.read(third[0], 'pred')})" for v in (value, negative))
        first, _, second = to.partition("|")
        if not second:
            return self.write(first, value)
        return f"const bool yes = {value}, no = {negative}; {self.write(first, 'yes')}{self.write(second, 'no')}"

    def op_selp(self, i):
        kind = i.type()
        to, a, b, condition = i.done(4)
        return self.write(to, f"({self.read(condition, 'pred')} ? {self.read(a, kind)} : {self.read(b, kind)})")

    def op_cvt(self, i):
        source, to = i.type(), i.type("f16x2", "bf16x2", *BITS)
        if to in ("f16x2", "bf16x2"):  # the first operand becomes the upper half
            i.need("rn")
            register, high, low = i.done(3)
            halves = [f"uint32_t{{narrow<{'Half' if to == 'f16x2' else 'Bfloat16'}>({self.read(x, source)})}}" for x in (high, low)]
            if source != "f32":
                raise Unsupported(f"type {source}")
            return self.write(register, f"({halves[0]} << 16 | {halves[1]})")
        saturate = i.take("sat")
        whole = i.take("rni", "rzi", "rmi", "rpi")
        rounding = i.take("rn")
        register, operand = i.done(2)
        value = self.read(operand, source)
        formats = {"f16": "Half", "bf16": "Bfloat16"}
        if source in formats:
            value, source = f"widen<{formats[source]}>({value})", "f32"
        from_float, to_float = is_float(source), is_float(to) or to in formats
        if from_float and not to_float:
            if not whole or saturate and BITS[to] > 64:
                raise Unsupported("float to integer without a rounding")
            return self.write(register, f"to_integer<{ctype(to)}>({value}, Rounding::{whole})")
        if not from_float and to_float:
            if not rounding or saturate:
                raise Unsupported("integer to float without .rn")
            if to in formats:
                raise Unsupported("integer to half")
            return self.write(register, f"static_cast<{ctype(to)}>({value})")
        if not from_float:
            return self.write(register, f"saturate<{ctype(to)}>({value})" if saturate else f"static_cast<{ctype(to)}>({value})")
        if to in formats:
            if saturate or whole or source != "f32" or not rounding:
                raise Unsupported(f"{source} to {to}")
            return self.write(register, f"narrow<{formats[to]}>({value})")
        if whole:
            value = f"round_whole({value}, Rounding::{whole})"
        if BITS[to] < BITS[source] and not rounding:
            raise Unsupported("narrowing without .rn")
        value = f"canonical(static_cast<{ctype(to)}>({value}))"
        return self.write(register, f"saturate_float({value})" if saturate else value)

    # ---- threads together

    def op_bar(self, i):
        if i.modifiers[:1] == ["warp"]:
            i.need("warp"), i.need("sync")
            return f"warp_barrier({self.read(i.done(1)[0], 'u32')}, {self.at(i)});"
        i.take("cta")
        i.take("aligned")
        if i.take("sync"):
            barrier, *threads = i.done(1, 2)
            return f"barrier({self.read(barrier, 'u32')}, {self.read(threads[0], 'u32') if threads else '0u'}, {self.at(i)});"
        i.need("red")
        kind = i.type("u32", "pred")
        operation = i.need("popc") if kind == "u32" else i.need("and", "or")
        to, barrier, *rest = i.done(3, 4)
        threads = self.read(rest[0], "u32") if len(rest) == 2 else "0u"
        count = f"barrier_count({self.read(barrier, 'u32')}, {threads}, {self.read(rest[-1], 'pred')}, {self.at(i)})"
        return self.write(to, {"popc": count, "or": f"{count} != 0", "and": f"{count} == block_threads()"}[operation])

    op_barrier = op_bar

    def op_shfl(self, i):
        i.type("b32")
        i.need("sync")
        mode = i.need("up", "down", "bfly", "idx")
        to, a, b, c, mask = i.done(5)
        register, _, predicate = to.partition("|")
        call = f"shuffle(Shuffle::{mode}, {', '.join(self.read(x, 'b32') for x in (mask, a, b, c))}, {self.at(i)})"
        return f"const auto got = {call}; {self.write(register, 'got.value')}{self.write(predicate, 'got.in_range') if predicate else ''}"

    def op_vote(self, i):
        kind = i.type("pred", "b32")
        i.need("sync")
        operation = i.need("ballot") if kind == "b32" else i.need("all", "any", "uni")
        to, condition, mask = i.done(3)
        mask = self.read(mask, "u32")
        call = f"ballot({mask}, {self.read(condition, 'pred')}, {self.at(i)})"
        tests = {"ballot": "votes", "any": "votes != 0", "all": f"votes == {mask}", "uni": f"votes == 0 || votes == {mask}"}
        return f"const uint32_t votes = {call}; {self.write(to, tests[operation])}"

    def op_match(self, i):
        kind = i.type("b32", "b64")
        i.need("sync")
        every = i.need("any", "all") == "all"
        to, value, mask = i.done(3)
        register, _, predicate = to.partition("|")
        call = f"match({self.read(mask, 'u32')}, {self.read(value, kind)}, {'true' if every else 'false'}, {self.at(i)})"
        return f"const uint32_t lanes = {call}; {self.write(register, 'lanes')}{self.write(predicate, 'lanes != 0') if predicate else ''}"

    def op_activemask(self, i):
        i.type("b32")
        return self.write(i.done(1)[0], "active_mask()")

    def op_redux(self, i):
        kind = i.type("u32", "s32", "b32")
        i.need("sync")
        operation = i.need("and", "or", "xor") + "_" if kind == "b32" else i.need("add", "min", "max")
        to, value, mask = i.done(3)
        return self.write(to, f"reduce<{ctype(kind)}>(Reduction::{operation}, {self.read(mask, 'u32')}, {self.read(value, kind)}, {self.at(i)})")

    def op_mma(self, i):
        i.need("sync"), i.need("aligned")
        shape = i.need("m8n8k16", "m16n8k16", "m16n8k32")
        i.need("row"), i.need("col")
        saturate = "true" if i.take("satfinite") else "false"
        if len(i.modifiers) != 4 or i.modifiers[0] != "s32" or i.modifiers[3] != "s32":
            raise Unsupported("accumulator or operand type")
        i.type("s32")
        b, a = i.type("u8", "s8"), i.type("u8", "s8")
        i.type("s32")
        d, *abc = i.done(4)
        counts = {"m8n8k16": (2, 1, 1, 2), "m16n8k16": (4, 2, 1, 4), "m16n8k32": (4, 4, 2, 4)}[shape]
        if tuple(len(elements(x)) for x in (d, *abc)) != counts:
            raise Unsupported("fragment size")
        fragments = [f"{{{', '.join(self.read(x, 'b32') for x in elements(fragment))}}}" for fragment in abc]
        signs = f"{'true' if a == 's8' else 'false'}, {'true' if b == 's8' else 'false'}, {saturate}"
        m, n, k = re.findall(r"\d+", shape)
        call = f"mma<{m}, {n}, {k}>({{{signs}}}, {{{', '.join(fragments)}}}, {self.at(i)})"
        return f"const auto d = {call}; " + "".join(self.write(x, f"d[{n}]") for n, x in enumerate(elements(d)))

    def op_ldmatrix(self, i):
        i.type("b16")
        (i.need("sync"), i.need("aligned"), i.need("m8n8"), i.need("shared", "shared::cta"))
        count = int(i.need("x1", "x2", "x4")[1:])
        transposed = "true" if i.take("trans") else "false"
        to, source = i.done(2)
        if len(elements(to)) != count:
            raise Unsupported("vector length")
        call = f"load_matrix({count}, {transposed}, static_cast<uint32_t>({self.address(source, 'shared')}), {self.at(i)})"
        return f"const auto d = {call}; " + "".join(self.write(x, f"d[{n}]") for n, x in enumerate(elements(to)))

    def op_cp(self, i):
        i.need("async")
        if i.take("commit_group"):
            i.done(0)
            return "commit_copies();"
        if i.take("wait_all"):
            i.done(0)
            return "commit_copies(); wait_copies(0);"
        if i.take("wait_group"):
            return f"wait_copies({self.read(i.done(1)[0], 'u32')});"
        through_l1 = i.need("ca", "cg") == "ca"
        i.need("shared", "shared::cta"), i.need("global")
        for hint in ("L2::64B", "L2::128B", "L2::256B"):
            i.take(hint)
        to, source, size, *read = i.done(3, 4)
        if size not in (("4", "8", "16") if through_l1 else ("16",)):
            raise Unsupported(f"{size} bytes")
        if read and read[0].lstrip("!") and (self.lookup(read[0].lstrip("!")) or ("",))[0] == "reg" and self.is_predicate(read[0].lstrip("!")):
            read_bytes = f"({self.read(read[0], 'pred')} ? 0u : {size}u)"  # ignore-src
        else:
            read_bytes = self.read(read[0], "u32") if read else f"{size}u"
        return (
            f"copy_async(static_cast<uint32_t>({self.address(to, 'shared')}), {self.address(source, 'global')}, {size}, {read_bytes}, {self.at(i)});"
        )

    def is_predicate(self, name):
        return f"bool {self.register(name)} = false;" in self.declarations


class Module:
    """A PTX file."""

    def __init__(self, text, allow_contraction=False):
        self.allow_contraction = allow_contraction
        self.files, self.functions, self.variables, self.sites = {}, {}, {}, {}
        self.shared = {}  # name -> (alignment, bytes or None: as many as the launch asks for)
        self.module_code, self.kernels, self.initializers = [], [], []
        self.text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))
        self.parse()

    def site(self, key):
        return f"kSites[{self.sites.setdefault(key, len(self.sites))}]"

    def statements(self, text):
        """Splits a function's body into instructions, directives, labels and braces."""
        text = re.sub(r"(\.loc[^\n;]*)\n", r"\1;\n", text)
        position, depth_end = 0, len(text)
        token = re.compile(r"\s*(?:([{}])|([\w$]+:)(?!:)(?!\s*\.branchtargets)|([^;]*?);)", re.DOTALL)
        while position < depth_end:
            if not text[position:].strip():
                return
            match = token.match(text, position)
            if match is None:
                raise Unsupported(f"PTX: {text[position : position + 80]!r}")
            yield (match[1] or match[2] or match[3]).strip()
            position = match.end()

    def parse(self):
        text, position = self.text, 0
        functions = []
        line = re.compile(r"\s*\.(version|target|address_size|file)\s+([^\n]*)")
        while text[position:].strip():
            if match := line.match(text, position):
                if match[1] == "file":
                    number, name = re.match(r'(\d+)\s+"([^"]*)"', match[2]).groups()
                    self.files[number] = Path(name).name
                position = match.end()
            elif match := re.compile(r"\s*\.section[^{]*\{[^}]*\}").match(text, position):
                position = match.end()
            elif match := re.compile(r"\s*((?:\.(?:visible|weak|extern)\s+)?\.(?:entry|func)\b[^{;]*)([{;])", re.DOTALL).match(text, position):
                position = match.end()
                if match[2] == "{":
                    depth = 1
                    while depth:
                        brace = re.compile(r"[{}]").search(text, position)
                        depth += 1 if brace[0] == "{" else -1
                        position = brace.end()
                    functions.append((match[1], text[match.end() : position - 1]))
            elif match := re.compile(r"\s*(\.[^;]*);").match(text, position):
                self.variable(match[1])
                position = match.end()
            else:
                raise Unsupported(f"PTX: {text[position : position + 80].strip()!r}")
        for _, body in functions:
            for declaration in re.findall(r"(\.shared\s[^;]*);", re.sub(r"\.loc[^\n]*", "", body)):
                if re.match(r"\.shared\s+\.align", declaration):
                    self.variable(declaration)
        headers = [self.header(header) for header, _ in functions]
        self.shared_in_functions = [body for (_, _, entry, *_), (_, body) in zip(headers, functions, strict=True) if not entry]
        for header, (_, body) in zip(headers, functions, strict=True):
            self.function(*header, body)

    def variable(self, text):
        """.global, .const and .shared variables of the module."""
        match = re.fullmatch(
            r"(?:\.(?:visible|weak|extern|common)\s+)*\.(global|const|shared)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
            r"(?:\[(\d*)\])?(?:\s*=\s*(.*))?", text.strip(), re.DOTALL)  # fmt: skip
        if match is None:
            raise Unsupported(f"PTX: {text!r}")
        space, alignment, kind, name, count, value = match.groups()
        size = BITS[kind] // 8
        alignment = max(int(alignment or 1), size)
        if space == "shared":
            self.shared[name] = (alignment, None if count == "" else size * int(count or 1))
            return
        values = [int(v.rstrip("U"), 0) for v in split_operands(value.strip("{} "))] if value and not re.search(r"[a-zA-Z_]{2}", value) else []
        if value and not values:
            raise Unsupported(f"PTX: initial value {value!r}")
        self.variables[name] = f"V{identifier(name)}"
        self.module_code.append(f"static uint8_t* V{identifier(name)};")
        data = b"".join((v & (1 << size * 8) - 1).to_bytes(size, "little") for v in values).ljust(size * int(count or 1), b"\0")
        numbers = ", ".join(map(str, data))
        self.initializers.append(f'{{"{name}", &V{identifier(name)}, {len(data)}, (const uint8_t[]){{{numbers}}}}},')

    def header(self, text):
        """Name, C++ name, whether it is a kernel, results and parameters [(name, alignment, bytes)], most threads."""
        entry = ".entry" in text
        match = re.match(
            r".*?\.(?:entry|func)\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\((.*?)\))?\s*((?:\.(?:maxntid|reqntid|minnctapersm|noreturn)\s*[\d,\s]*)*)$",
            text.strip(),
            re.DOTALL,
        )
        if match is None:
            raise Unsupported(f"PTX: {text!r}")
        results, name, params, limits = (match[1] or "", match[2], match[3] or "", match[4])
        parsed = []
        for param in split_operands(results) + split_operands(params):
            form = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
            one = re.fullmatch(form, param)
            if one is None:
                raise Unsupported(f"PTX: parameter {param!r}")
            size = BITS[one[2]] // 8
            parsed.append((one[3], max(int(one[1] or 1), size), size * int(one[4] or 1)))
        most = re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", limits)
        threads = 1024
        if most:
            threads = 1
            for n in most[1].split(","):
                threads *= int(n)
        cname = f"{'kernel' if entry else 'function'}_{len(self.functions)}"
        self.functions[name] = cname
        return name, cname, entry, parsed, threads

    def shared_offset(self, function, name):
        """Where a shared variable lies: those of device functions first, then the kernel's own, then what the launch asks for."""
        if name not in function.layout:
            raise Unsupported(f"shared variable {name}")
        return function.layout[name]

    def layout(self, body):
        mentioned = [name for name, (_, size) in self.shared.items() if size is not None and
                     any(re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", b) for b in [*self.shared_in_functions, body])]  # fmt: skip
        in_functions = [n for n in mentioned if any(n in b for b in self.shared_in_functions)]
        offsets, end = {}, 0
        for name in sorted(mentioned, key=lambda n: n not in in_functions):
            alignment, size = self.shared[name]
            offsets[name] = end = -(-end // alignment) * alignment
            end += size
        dynamic = {name: alignment for name, (alignment, size) in self.shared.items() if size is None}
        end = -(-end // max([16, *dynamic.values()])) * max([16, *dynamic.values()]) if dynamic else end
        return {**offsets, **dict.fromkeys(dynamic, end)}, end

    def function(self, name, cname, entry, params, threads, body):
        function = Function(self, name, entry)
        function.layout, static_bytes = self.layout(body)
        offset = 0
        layout = []
        for n, (param, alignment, size) in enumerate(params):
            offset = -(-offset // alignment) * alignment
            function.declare(param, ("param", f"(params + {offset})" if entry else f"param_{n}"))
            layout.append(f"{{{offset}, {size}}}")
            offset += size
        try:
            function.body(self.statements(body))
        except Unsupported as error:
            file, line = function.site
            raise Unsupported(f"{error}: `{function.statement_text}` at {file}:{line}, in {name}") from None
        arguments = "uint8_t* params" if entry else ", ".join(f"uint8_t* param_{n}" for n in range(len(params)))
        self.module_code.append(f"static void {cname}({arguments});")
        self.kernels.append(f"static void {cname}({arguments}) {{\n" + "\n".join(function.declarations + function.code) + "\n}")
        if entry:
            self.initializers.append("")
            self.module_code.append(f"static constexpr Parameter kParameters_{cname}[] = {{{', '.join(layout) or '{0, 0}'}}};")
            entry_text = f'{{"{name}", {cname}, kParameters_{cname}, {len(params)}, {offset}, {static_bytes}, {threads}}},'
            self.module_code.append(f"#define ENTRY_{cname} {entry_text}")

    def cpp(self):
        entries = "\n".join(f"ENTRY_{c}" for c in self.functions.values() if c.startswith("kernel"))
        sites = ",\n".join(f'{{"{file}", {line}, "{what}"}}' for file, line, what in self.sites) or '{"", 0, ""}'
        variables = "\n".join(line for line in self.initializers if line)
        return "\n".join([
            "// Written by ptx.py.",
            '#include "ptx_kernel.h"',
            "using namespace cuda_on_cpu;",
            "namespace {",
            f"constexpr Site kSites[] = {{{sites}}};",
            *self.module_code,
            *self.kernels,
            f"const Kernel kKernels[] = {{\n{entries}\n}};",
            f"const Variable kVariables[] = {{\n{variables}\n{{nullptr, nullptr, 0, nullptr}}}};",
            "const bool registered = (register_module(kKernels, std::size(kKernels), kVariables), true);",
            "}  // namespace",
            "",
        ])  # fmt: skip


def translate(text, allow_contraction=False):
    """C++ source for the kernels of PTX source `text`. `allow_contraction` takes float operations that ptxas may fuse."""
    return Module(text, allow_contraction).cpp()


if __name__ == "__main__":
    source, target, *options = sys.argv[1:]
    Path(target).write_text(translate(Path(source).read_text(), "--allow-contraction" in options))

"""Recordings: the int8 ops of a graph, put into as few calls of torch.ops.probquant.run as float islands allow.

A call from Python costs more than a small layer's arithmetic: a MobileNetV2 on one image of 224 x 224 spends a third of its time
between its ops. A QuantizedModel that is called plainly on the CPU therefore runs as recorded here; whoever traces it
(torch.compile, torch.export, make_fx, its own capture) sees its graph, or what its recorded() gives, in which a recording is a text and its constants
are arguments; the plain call's are held in C++. The format stands in csrc/torch/recording.h.

A recording also tells what each op moves for an image, and whether it works image by image, from which a replay plans which ops take
the whole batch at once and which a few images at a time (csrc/torch/stretches.h).
"""

from __future__ import annotations

import operator
import string
import struct
import weakref
from collections.abc import Iterator
from itertools import chain

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ._ops import ops

_NOT_RECORDED = ("run", "run_held", "hold", "release", "pack_weight")
_WORTH_FETCHING = 1 << 14  # bytes of a weight, from which on the layer before is told of it
_run_held = ops.run_held.default
_flatten = torch.ops.aten.flatten.using_ints  # the one op of torch that is recorded
_TRAFFIC = 5  # numbers for each op, before the ops
_ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
_OF_ALL_IMAGES = {"packed_weight", "predictor", "weight", "bias", "scale", "zero_point"}  # arguments that are not activations


class _Refused(Exception):
    """A node that has no form in a recording."""


def _release(held: int) -> None:
    with _disable_current_modes():  # garbage may be collected while somebody traces
        ops.release.default(held)


class _Held:
    """A recording and its constants, held for torch.ops.probquant.run_held until this object goes."""

    def __init__(self, constants: list[torch.Tensor], recording: str):
        self.number = ops.hold.default(constants, recording)
        weakref.finalize(self, _release, self.number)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return _run_held(inputs, self.number)


def record(graph_module: fx.GraphModule, inputs: tuple | None = None, least: int = 2, hold: bool = False) -> fx.GraphModule | None:
    """The graph with its int8 ops recorded, and tensors of `graph_module` as its constants; None if there is nothing to win, as
    off the CPU. inputs: what the graph is called with, whose sizes tell how to split batches; without them no batch is split. least: ops
    that are worth a recording. hold: its recordings are held with their constants (run_held), which saves most of what a call costs beside its ops;
    the graph can be neither traced nor copied then."""
    if not all(tensor.is_cpu for tensor in chain(graph_module.parameters(), graph_module.buffers())):
        return None
    levels = _levels(graph_module.graph)
    recorded: dict[int, list[fx.Node]] = {}
    for node, (level, is_recorded) in levels.items():
        if is_recorded:
            recorded.setdefault(level, []).append(node)
    recorded = {level: nodes for level, nodes in recorded.items() if sum(map(_is_op, nodes)) >= least}
    if not recorded:
        return None
    sizes = {} if inputs is None else _image_bytes(graph_module, inputs)
    root: dict[str, object] = {}
    graph, copies = fx.Graph(), {}
    graph.set_codegen(graph_module.graph._codegen)
    inside = {node for nodes in recorded.values() for node in nodes}
    for level in range(max(level for level, _ in levels.values()) + 1):
        for node, (at, _) in levels.items():  # its float nodes, and int8 ops that are not worth a recording
            if at == level and node not in inside and not (node.op == "get_attr" and set(node.users) <= inside):
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    root[node.target] = operator.attrgetter(node.target)(graph_module)
        if level in recorded:
            _add_run(graph, copies, root, graph_module, recorded[level], sizes, f"recording_{level}", hold)
    if hold:
        _take_as_it_is(graph)
    return fx.GraphModule(root, graph)


def _take_as_it_is(graph: fx.Graph) -> None:
    """Takes pytree out of a graph whose arguments are tensors, and its results at most in tuples, lists and dictionaries."""
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None or info.out_spec is None:
        return
    names = [node.target for node in graph.nodes if node.op == "placeholder"]
    flat = pytree.tree_structure((tuple(names), {})) == info.in_spec and names == info.orig_args
    output = next(node for node in graph.nodes if node.op == "output")
    if flat and all(spec.is_leaf() or spec.type in (tuple, list, dict) for spec in _specs(info.out_spec)):
        output.args = (pytree.tree_unflatten(output.args[0], info.out_spec),)
        graph.set_codegen(fx.graph.CodeGen())


def _specs(spec: pytree.TreeSpec) -> Iterator[pytree.TreeSpec]:
    yield spec
    for child in spec.children():
        yield from _specs(child)


def _is_op(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _levels(graph: fx.Graph) -> dict[fx.Node, tuple[int, bool]]:
    """For every node, in order: its level, and whether it is recorded. The recorded nodes of a level can run together, after
    the others of that level, which need recorded nodes of lower levels alone."""
    levels: dict[fx.Node, tuple[int, bool]] = {}
    for node in graph.nodes:
        is_recorded = _is_recordable(node) or (_reshapes(node) and levels[node.args[0]][1])
        level = 0
        for source in node.all_input_nodes:
            of_source, source_is_recorded = levels[source]
            level = max(level, of_source + (source_is_recorded and not is_recorded))
        levels[node] = (level, is_recorded)
    return levels


def _is_recordable(node: fx.Node) -> bool:
    if not _is_op(node) or node.target.namespace != "probquant" or node.target._opname in _NOT_RECORDED:
        return False
    try:
        _encode(node, dict.fromkeys(node.all_input_nodes, 0))
    except _Refused:
        return False
    return True


def _reshapes(node: fx.Node) -> bool:
    """Whether the node only takes a value out of several, or flattens one image by image."""
    return node.target is operator.getitem or (node.target is _flatten and node.args[1:] == (1,))


def _image_bytes(graph_module: fx.GraphModule, inputs: tuple) -> dict[fx.Node, int]:
    """For every tensor of the graph, called with these inputs, the bytes of an image: of an index into its first dimension."""
    found: dict[fx.Node, int] = {}

    class Sizes(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[0]:
                found[node] = value.nbytes // value.shape[0]
            return value

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        Sizes(graph_module).run(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    return found


def _add_run(
    graph: fx.Graph, copies: dict, root: dict, graph_module: fx.GraphModule, nodes: list[fx.Node], sizes: dict, name: str, hold: bool
) -> None:
    """Appends a call that runs `nodes`, and what others read of its results, to the graph."""
    mine = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in mine))
    constants = [source for source in inputs if source.op == "get_attr"]
    inputs = [source for source in inputs if source.op != "get_attr"]
    operations = [node for node in nodes if _is_op(node)]
    numbers = {source: i for i, source in enumerate([*inputs, *constants])}
    given = count = len(numbers)
    for node in operations:
        numbers.update({value: count + i for i, value in _values(node)})
        count += len(node.target._schema.returns)
    results = {numbers[node]: node for node in nodes if node in numbers and not set(node.users) <= mine}
    last_reader = {numbers[source]: node for node in operations for source in node.all_input_nodes}

    upcoming = _upcoming(operations, graph_module, numbers)
    names = list(dict.fromkeys(node.target._opname for node in operations))
    by_image = _by_image(operations, inputs)
    traffic: list[int] = []
    body: list[int] = []
    alive: dict[int, int] = {}  # bytes of an image
    count = given
    for node in operations:
        produced = range(count, count + len(node.target._schema.returns))
        read = {numbers[source] for source in node.all_input_nodes if source in mine}
        unread = [i for i in sorted(read) if last_reader[i] is node] + [i for i in produced if i not in last_reader]
        unread = [i for i in unread if i not in results]
        leaves = not results.keys().isdisjoint(produced)
        start = len(body)
        place = -1 if leaves else _place(node, numbers, unread)
        body += [names.index(node.target._opname), int(leaves), upcoming[node], place, *_encode(node, numbers), len(unread), *unread]
        written = {numbers[value]: sizes.get(value, 0) for _, value in _values(node)}
        moved = (source for source in node.all_input_nodes if source.op != "get_attr" and numbers[source] != place)
        activations = sum(written.values()) + sum(sizes.get(source, 0) for source in moved)
        weights = sum(operator.attrgetter(source.target)(graph_module).nbytes for source in node.all_input_nodes if source.op == "get_attr")
        alive = {value: size for value, size in (alive | written).items() if value not in unread}
        traffic += [len(body) - start, int(node in by_image), activations, sum(alive.values()), weights]
        count = produced.stop

    head = [len(names)]
    for op in names:
        head += [len(op), *op.encode()]
    head += [len(results), *results]
    head += [sum(sizes.get(source, 0) for source in inputs), len(operations)]
    tensors, recording = [operator.attrgetter(node.target)(graph_module).detach() for node in constants], _write(head + traffic + body)
    if hold and inputs:  # which tell where to run
        call = graph.call_function(_Held(tensors, recording).run, ([copies[source] for source in inputs],))
    else:
        root[f"{name}_constants"] = tensors
        call = graph.call_function(ops.run.default, ([copies[source] for source in inputs], graph.get_attr(f"{name}_constants"), recording))
    for i, number in enumerate(results):
        value = graph.call_function(operator.getitem, (call, i))
        copies.update({node: value for node in nodes if numbers.get(node) == number})


def _arguments(node: fx.Node) -> dict[str, object]:
    """What an op is called with, by name."""
    names = (argument.name for argument in node.target._schema.arguments)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _by_image(operations: list[fx.Node], inputs: list[fx.Node]) -> set[fx.Node]:
    """The ops and values whose part for an index into their first dimension depends on that part of the inputs alone. No int8 op mixes
    samples, but one may read constants as activations, or what was made of these."""
    found = set(inputs)
    for node in operations:
        shared: list[fx.Node] = []
        activations: list[fx.Node] = []
        for name, value in _arguments(node).items():
            fx.map_arg(value, (shared if name in _OF_ALL_IMAGES else activations).append)
        if activations and found.issuperset(activations) and all(source.op == "get_attr" for source in shared):
            found.update((node, *(value for _, value in _values(node))))
    return found


def _upcoming(operations: list[fx.Node], graph_module: fx.GraphModule, numbers: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """For every op the number of the packed weight that is read next behind it, or -1. Small ones, as of depthwise layers, are passed over."""
    upcoming, number = {}, -1
    for node in reversed(operations):
        upcoming[node] = number
        weight = _arguments(node).get("packed_weight")
        if weight is not None and weight.op == "get_attr" and operator.attrgetter(weight.target)(graph_module).numel() >= _WORTH_FETCHING:
            number = numbers[weight]
    return upcoming


def _place(node: fx.Node, numbers: dict[fx.Node, int], unread: list[int]) -> int:
    """The number of the residual whose memory the output takes, or -1: one that no one reads any more, and this op once."""
    residual = _arguments(node).get("residual")
    if residual is None or numbers[residual] not in unread:
        return -1
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), read.append)
    return numbers[residual] if read.count(residual) == 1 else -1


def _values(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """The tensors that an op gives: (which result, the node that stands for it)."""
    if len(node.target._schema.returns) == 1:
        return [(0, node)]
    return [(user.args[1], user) for user in node.users if user.target is operator.getitem]


def _encode(node: fx.Node, numbers: dict[fx.Node, int]) -> list[int]:
    """The arguments of an op's call, in the order of its schema."""
    code: list[int] = []
    for i, argument in enumerate(node.target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        kind = str(argument.type)
        if kind == "Optional[Tensor]":
            code.append(-1 if value is None else _number(value, numbers))
        elif kind.startswith("Optional["):
            code += [0] if value is None else [1, *_encode_value(value, kind[len("Optional[") : -1], numbers)]
        elif kind.startswith("List["):
            code.append(len(value))
            for item in value:
                code += _encode_value(item, kind[len("List[") : -1], numbers)
        else:
            code += _encode_value(value, kind, numbers)
    return code


def _encode_value(value, kind: str, numbers: dict[fx.Node, int]) -> list[int]:
    if kind == "Tensor":
        return [_number(value, numbers)]
    if kind == "float" and isinstance(value, (int, float)):
        return list(struct.unpack("<q", struct.pack("<d", value)))
    if kind in ("int", "bool") and isinstance(value, int):
        return [int(value)]
    raise _Refused(f"{value!r} for {kind}")


def _number(value, numbers: dict[fx.Node, int]) -> int:
    if not isinstance(value, fx.Node):
        raise _Refused(f"{value!r} for a tensor")
    return numbers[value]


def _write(numbers: list[int]) -> str:
    """The text that stands for numbers of 64 bits."""
    text = []
    for number in numbers:
        rest = number << 1 if number >= 0 else ~(number << 1)
        while rest >= 32:
            text.append(_ALPHABET[32 + rest % 32])
            rest >>= 5
        text.append(_ALPHABET[rest])
    return "".join(text)


def _read(text: str) -> list[int]:
    """What _write wrote."""
    numbers, number, shift = [], 0, 0
    for character in text:
        value = _ALPHABET.index(character)
        number |= value % 32 << shift
        shift += 5
        if value < 32:
            numbers.append(number >> 1 if number % 2 == 0 else ~(number >> 1))
            number = shift = 0
    return numbers


@torch.library.register_fake("probquant::run")
def _(inputs, constants, recording):
    """Runs the fakes of what was recorded."""
    numbers = iter(_read(recording))

    def take(kind: str):
        if kind == "Optional[Tensor]":
            number = next(numbers)
            return None if number < 0 else values[number]
        if kind.startswith("Optional["):
            return take(kind[len("Optional[") : -1]) if next(numbers) else None
        if kind.startswith("List["):
            return [take(kind[len("List[") : -1]) for _ in range(next(numbers))]
        if kind == "Tensor":
            return values[next(numbers)]
        if kind == "float":
            return struct.unpack("<d", struct.pack("<q", next(numbers)))[0]
        return bool(next(numbers)) if kind == "bool" else next(numbers)

    values = [*inputs, *constants]
    names = [bytes(take("List[int]")).decode() for _ in range(next(numbers))]
    results = take("List[int]")
    next(numbers)  # bytes of the inputs
    operations = next(numbers)
    for _ in range(_TRAFFIC * operations):
        next(numbers)
    for _ in range(operations):
        name = names[next(numbers)]
        op = _flatten if name == _flatten._opname else getattr(ops, name).default
        next(numbers), next(numbers), next(numbers)  # whether its results leave, which weight is behind it, whose place it takes
        given = op(*[take(str(argument.type)) for argument in op._schema.arguments])
        take("List[int]")  # what no one reads any more
        values += given if isinstance(given, (tuple, list)) else [given]
    return [values[i] for i in results]

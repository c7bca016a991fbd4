"""Follow a pickle without running it: what it would import, which storages it reads, which keys it gives twice."""

import io
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


# A tensor takes some hundred bytes of a checkpoint's pickle, and a ViT-B/16 with AdamW's state has some 1,200.
MAX_BYTES = 2 << 20
# Values in arguments and keys, counted as often as they're referred to.
MAX_VALUES = 2_000_000
_MARK = object()
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class PickleError(ValueError):
    """The pickle can't be followed: damaged, or made to mislead; the message says how."""


@dataclass(frozen=True)
class Name:
    """An object that the pickle imports."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class _Made:
    """A container, or what a call gives."""

    values: list[Any] = field(default_factory=list)
    keys: set[Any] = field(default_factory=set)


@dataclass(frozen=True)
class Storage:
    """Numbers that a pickle takes from the file: `count` of them, of type `kind`, in the member `key`."""

    kind: str
    key: str
    count: int


@dataclass
class Contents:
    """What a pickle imports and reads.

    Attributes:
        names: In the order of the file, each once.
        called: Those of them that are called.
        storages: Likewise.
        value: The pickle's, where it is a number or a text.
    """

    names: dict[Name, None] = field(default_factory=dict)
    called: dict[Name, None] = field(default_factory=dict)
    storages: dict[Storage, None] = field(default_factory=dict)
    value: Any = None


class _Follower:
    """The stack and memo of one pickle."""

    def __init__(self, data: bytes, found: Contents):
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.left = MAX_VALUES
        self.found = found

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any, position: int) -> None:
        """Do to the stack what an opcode does, as far as it's told without running anything."""
        name, stack = opcode.name, self.stack
        if name in _PUTS:
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "STOP":
            value = stack.pop()
            self.found.value = value if isinstance(value, int | str) else None
        elif name in ("GLOBAL", "INST"):
            self.pop(opcode)
            # As it stands there, since pickletools reads escapes into it.
            middle = self.data.index(b"\n", position)
            end = self.data.index(b"\n", middle + 1)
            parts = self.data[position + 1 : middle], self.data[middle + 1 : end]
            self.name(*(part.decode("utf-8", "backslashreplace") for part in parts))
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            self.set_items(opcode)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            *values, target = reversed(self.pop(opcode))
            if isinstance(target, _Made):
                target.values += values
            stack.append(target)
        else:
            self.other(opcode, argument)

    def other(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do what the opcodes do that neither store nor change."""
        name, popped = opcode.name, self.pop(opcode)
        if name == "STACK_GLOBAL":
            module, attribute = (part if isinstance(part, str) else "(computed)" for part in popped)
            self.name(module, attribute)
        elif name.startswith("EXT"):
            self.name("copyreg", f"extension {argument}")
        elif name == "BUILD":
            self.stack.append(popped[0])
        elif opcode.stack_after:
            self.count(popped)
            if name in ("PERSID", "BINPERSID"):
                self.storage(popped)
            elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"):
                self.call(*popped)
            made = bool(opcode.stack_before) or (argument is None and name not in _CONSTANTS)
            self.stack.append(_Made(popped) if made else _CONSTANTS.get(name, argument))

    def pop(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """Take an opcode's values off the stack, in the order in which they were put there."""
        before, values = list(opcode.stack_before), []
        if pickletools.markobject in before:
            while (value := self.stack.pop()) is not _MARK:
                values.append(value)
            before = before[: before.index(pickletools.markobject)]
        values += [self.stack.pop() for _ in before]
        return values[::-1]

    def set_items(self, opcode: pickletools.OpcodeInfo) -> None:
        """Put keys and values into a dict, none of them twice."""
        popped = self.pop(opcode)
        target, items = (_Made(), popped) if opcode.name == "DICT" else (popped[0], popped[1:])
        self.stack.append(target)
        if not isinstance(target, _Made):
            return
        target.values += items
        self.count(items[0::2])
        for key in items[0::2]:
            if key in target.keys:
                raise PickleError(f"it gives the key {str(key)[:200]!r} twice")
            target.keys.add(key)

    def count(self, values: Sequence[Any]) -> None:
        """Raise for values that refer to each other so often that to hash them would take for ever."""
        pending = list(values)
        while pending:
            value = pending.pop()
            self.left -= 1
            if isinstance(value, _Made):
                if len(value.values) + len(pending) > self.left:
                    raise PickleError("it nests its values absurdly")
                pending += value.values
            if self.left < 0:
                raise PickleError("it nests its values absurdly")

    def call(self, called: Any, *arguments: Any) -> None:
        """Note a call."""
        if not isinstance(called, Name):
            return
        self.found.called[called] = None
        values = arguments[0].values if arguments and isinstance(arguments[0], _Made) else []
        # How Python 3 writes bytes in protocol 2; other encodings could enlarge them again and again.
        if str(called) == "_codecs.encode" and values[1:] != ["latin1"]:
            raise PickleError("it encodes text in another way than bytes are written")

    def name(self, module: str, name: str) -> None:
        """Note an import."""
        found = Name(module, name)
        self.found.names[found] = None
        self.stack.append(found)

    def storage(self, popped: Sequence[Any]) -> None:
        """Note what a persistent id of `torch.save` stands for: ("storage", type, key, device, count, …)."""
        if len(popped) == 1 and isinstance(popped[0], _Made) and len(popped[0].values) >= 5:
            _, kind, key, _, count = popped[0].values[:5]
            if isinstance(kind, Name) and isinstance(count, int):
                self.found.storages[Storage(kind.name, str(key), count)] = None


def follow_pickle(data: bytes, start: int, found: Contents) -> int:
    """Find out what a pickle imports and reads; nothing is imported or run.

    Args:
        data: Has a pickle at byte `start`.
        found: Gets what is found, also where an error ends it.

    Returns:
        The byte after the pickle.

    Raises:
        PickleError: It's damaged, gives a dict the same key twice or nests its values absurdly.
    """
    follower = _Follower(data, found)
    stream = io.BytesIO(data)
    stream.seek(start)
    try:
        for opcode, argument, position in pickletools.genops(stream):
            follower.step(opcode, argument, position or 0)
    except PickleError:
        raise
    except UnicodeDecodeError as error:
        raise PickleError(f"it has a name that isn't plain ASCII, {error.object[:200]!r}") from error
    except IndexError as error:
        raise PickleError("it takes a value from an empty stack") from error
    except KeyError as error:
        raise PickleError(f"it takes what it never stored, {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise PickleError(str(error)) from error
    return stream.tell()

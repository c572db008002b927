"""A device that no machine lacks: `away` computes on the processor, and is as strict as a graphics processor.

Tensors here and tensors away do not mix, but for single numbers and indices, and what a processor would have to wait for is noted:
values taken away from the device, and copies to it that do not say `non_blocking`.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "away"
KNOWN_TO_TORCH = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # from torch 2.10 on
BENCH = str(Path(__file__).parents[1] / "bench")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
ASKING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
_waits: Counter[str] = Counter()
_calls: Counter[str] = Counter()
_draws: Counter[str] = Counter()


class Away(Tensor):
    """A tensor of the device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Away":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Away({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _calls[str(func)] += 1
        if torch.Tag.nondeterministic_seeded in func.tags:
            _draws[str(func)] += 1
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in leaves if not isinstance(t, Away) and t.dim() > 0]
        if here and func not in COPIES | INDEXED:
            raise RuntimeError(f"{func} of tensors here and away: {[tuple(t.shape) for t in leaves]}")
        back = device is not None and torch.device(device).type == "cpu"
        back |= func is aten.copy_.default and not isinstance(args[0], Away)
        if back or func in ASKING or (here and not _without_waiting(func, args, kwargs)):
            _waits[_place()] += 1
        if device is not None:
            kwargs["device"] = "cpu"
        made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func is aten._to_copy.default and back:
            return made
        known = {id(t.held): t for t in leaves if isinstance(t, Away)}

        def wrapped(value: Any) -> Any:  # what was changed in place is still the same
            return value if not isinstance(value, Tensor) else known[id(value)] if id(value) in known else Away(value)

        return tree_map(wrapped, made)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Away) else value


def _without_waiting(func: Any, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,)))


def _place() -> str:
    """The line of bench/ that has to wait."""
    lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(BENCH)]
    return f"{Path(lines[-1].filename).name}: {lines[-1].line}" if lines else "the test"


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """What is waited for while open, by the line of code that does."""
    _waits.clear()
    yield _waits


@contextmanager
def draws() -> Iterator[Counter[str]]:
    """How often the device draws noise of its own while open, which is not the processor's."""
    _draws.clear()
    yield _draws


@contextmanager
def calls() -> Iterator[Counter[str]]:
    """How often the device is called while open, by operation; those that only look at a tensor in another way included."""
    _calls.clear()
    yield _calls


class _Module:
    """What torch asks of a device. It is not `available`: nothing else in a process shall take it for its accelerator."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


def _factories() -> Iterator[tuple[str, Any]]:
    """Operations that make a tensor from none, by name."""
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        packet, _, overload = name.partition(".")
        if (
            namespace != "aten"
            or not hasattr(aten, packet)
            or not hasattr(getattr(aten, packet), overload or "default")
        ):
            continue
        op = getattr(getattr(aten, packet), overload or "default")
        given = {argument.name: str(argument.type) for argument in op._schema.arguments}
        makes = [str(of.type) for of in op._schema.returns]
        if "device" in given and makes == ["Tensor"] and not any("Tensor" in kind for kind in given.values()):
            yield name, op


def _registered() -> torch.library.Library:
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for name, op in _factories():

        def make(*args: Any, op: Any = op, **kwargs: Any) -> Away:
            return Away(op(*args, **kwargs | {"device": "cpu", "pin_memory": False}))

        library.impl(name, make, "PrivateUse1")

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        _held(target).copy_(_held(source))
        return target

    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


LIBRARY = _registered() if KNOWN_TO_TORCH else None  # as long as it is held, the device is there

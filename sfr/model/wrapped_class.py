"""The class that a wrapped model gets: a subclass of its own whose calls are recorded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from sfr.model.record import RECORD, record_of

PLAIN = "_sfr_plain"  # the class attribute that names the class of before

_made: WeakValueDictionary[Any, type] = WeakValueDictionary()


def wrapped_class(plain: Any, wrapper: type) -> type:
    """Return a subclass of a module's class and of `wrapper` whose calls are recorded.

    The model's own class comes first, so that what it defines wins. One class is made for each and kept as long as
    there are models of it.

    Args:
        plain: the class of a model.
        wrapper: :class:`sfr.SFRWrapper`, which knows this module and is not known to it.

    Raises:
        TypeError: if the class admits no subclass.
    """
    if issubclass(plain, wrapper):
        return plain
    if plain.__module__ == "torch.nn.utils.parametrize":  # expects to be the outermost, to be taken off again
        return _rebased(plain, lambda base: wrapped_class(base, wrapper))
    if plain not in _made:
        try:
            cls = _made[plain] = type(plain)(plain.__name__, (plain, wrapper), _namespace(plain, wrapper))
        except Exception as error:
            raise TypeError(
                f"the model's class {plain.__qualname__} cannot be wrapped, because a subclass of it cannot be made "
                f"({type(error).__name__}: {error}). Wrap a module that holds the model, or let its metaclass or "
                "__init_subclass__ accept a subclass without arguments"
            ) from error
        return cls
    return _made[plain]


def plain_class(cls: type, wrapper: type) -> type:
    """Return a class as it was before, also below those that PyTorch has put on top (parametrize, FSDP2)."""
    if PLAIN in vars(cls):
        plain: type = vars(cls)[PLAIN]
        return plain
    return _rebased(cls, lambda base: plain_class(base, wrapper)) if issubclass(cls, wrapper) else cls


def _rebased(cls: type, change: Callable[[type], type]) -> type:
    """Return a class like this one, on other bases."""
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(change, cls.__bases__)), namespace)


def _namespace(plain: Any, wrapper: type) -> dict[str, Any]:
    """Return what the wrapped class defines itself."""
    # A GraphModule puts a __call__ on whatever class it has, over one that is there.
    caller: Any = nn.Module if issubclass(plain, torch.fx.GraphModule) else plain

    def call_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return caller.__call__(self, *args, **kwargs)

    @functools.wraps(caller.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is None:
            return call_plain(self, *args, **kwargs)
        return record.call(self, call_plain, args, kwargs)

    @functools.wraps(plain.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if (args and args[0] is self) or kwargs.get("model") is self:
            return  # Python calls it after SFRWrapper.__new__, which was given the model
        plain.__init__(self, *args, **kwargs)
        if RECORD not in self.__dict__ and PLAIN in vars(type(self)):  # of model[:3], or type(model)(...)
            swap_class(self, plain)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = plain.__reduce_ex__(self, protocol)
        if record_of(self) is None or isinstance(reduced, str):
            return reduced
        make, args, *rest = reduced
        make, *args = (plain if vars(type(self)).get(PLAIN) and each is type(self) else each for each in (make, *args))
        return _rebuilt, (wrapper, make, tuple(args)), *rest

    def wrapped_anew(original: Any, copied: nn.Module, *, shallow: bool) -> nn.Module:
        record = record_of(original)
        if record is not None and record_of(copied) in (None, record):
            vars(copied)[RECORD] = record.for_copy(copied, shallow)
        return swap_class(copied, wrapped_class(type(copied), wrapper))

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        return wrapped_anew(self, plain.__deepcopy__(self, memo), shallow=False)

    def __copy__(self: Any) -> Any:
        copied = plain.__copy__(self) if hasattr(plain, "__copy__") else _shallow_copy(self)
        return wrapped_anew(self, copied, shallow=True)

    def __prepare_scriptable__(self: Any) -> Any:
        """Return the plain model, on the same parameters and buffers, for TorchScript, which compiles no tap."""
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        twin = take_off(copy.deepcopy(self, shared), wrapper)
        return plain.__prepare_scriptable__(twin) if hasattr(plain, "__prepare_scriptable__") else twin

    namespace = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__init__": __init__,
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__copy__": __copy__,
        "__prepare_scriptable__": __prepare_scriptable__,
        PLAIN: plain,
    }
    return namespace | ({"__deepcopy__": __deepcopy__} if hasattr(plain, "__deepcopy__") else {})


def _shallow_copy(model: Any) -> nn.Module:
    """Return what ``copy.copy`` makes of a model whose class does not define it."""
    make, args, state, *_ = model.__reduce_ex__(4)
    copied: nn.Module = make(*args)
    copied.__setstate__(state)
    return copied


def take_off(model: nn.Module, wrapper: type) -> nn.Module:
    """Undo the wrapping of a model in place, and return it; a model that is not wrapped is returned unchanged."""
    record = vars(model).pop(RECORD, None)
    if record is None:
        return model
    record.recorder.detach()
    swap_class(model, plain_class(type(model), wrapper))
    if isinstance(model, torch.fx.GraphModule):
        model.recompile()  # its code lies in its class, and may have been put into the one it had meanwhile
    return model


def _rebuilt(wrapper: type, make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """Make a copy of a wrapped model, whose record comes with its state."""
    model = make(*args)
    return swap_class(model, wrapped_class(type(model), wrapper))


def swap_class(model: nn.Module, cls: type) -> nn.Module:
    """Give a model another class, past what its own may make of the assignment, and return it."""
    object.__setattr__(model, "__class__", cls)
    return model

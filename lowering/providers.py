"""Which code an fxfuse op gets on which target: a table of providers, the newest asked first.

In come a device type and the facts of a call; out comes a Choice that says who took it and why the
others did not. Who raises is asked no more. `targets` enters our own providers; `register` hands
the ops to Inductor; nothing else happens at import.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

import fxfuse.add_norm
import fxfuse.attention
import fxfuse.ops
from fxfuse.lowering import opaque
from fxfuse.patterns.record import AddNorm, DecodeAttention, Record
from fxfuse.settings import FxfuseError

log = logging.getLogger(__name__)

# Inductor's TensorBox, or any tensor.
Box = Any
Lower = Callable[[str, tuple[Any, ...], Any], Any]
Run = Callable[..., "Tensor | tuple[Tensor | None, ...]"]
AnyRecord: TypeAlias = Record | AddNorm | DecodeAttention

# The ops, and what reads their records.
OPS: dict[str, Callable[[str], AnyRecord]] = {
    "norm_rope": fxfuse.ops.read_record,
    "norm_rope_store_": fxfuse.ops.read_record,
    "project_norm_rope_store_": fxfuse.ops.read_record,
    "add_rms_norm": fxfuse.add_norm.read_record,
    "decode_attention": fxfuse.attention.read_record,
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a provider decides by; a size that is symbolic is None.

    record  of the site: `fxfuse.patterns.record.Record`, or `AddNorm` for add_rms_norm, or
            `DecodeAttention` for decode_attention
    heads   of q, k, v; None where a stream is absent too; empty for both of these
    batch   B of q
    shape   of add_rms_norm's x
    dtypes  of q, k, v, or x and the weights they are made of, and of their caches, or of
            add_rms_norm's tensors, by the names of the op's
            arguments; of those that are there
    device  where they are, None where unknown
    """

    record: AnyRecord
    heads: tuple[int | None, ...] = ()
    batch: int | None = None
    shape: tuple[int | None, ...] = ()
    dtypes: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)
    device: torch.device | None = None

    @property
    def op(self) -> str:
        """The op's name."""
        if isinstance(self.record, AddNorm):
            return "add_rms_norm"
        if isinstance(self.record, DecodeAttention):
            return "decode_attention"
        if self.record.projected:
            return "project_norm_rope_store_"
        return "norm_rope_store_" if self.record.store else "norm_rope"


def takes_all(facts: Facts) -> str | None:
    """The `declines` of a provider that declines nothing."""
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Provider:
    """One way to lower some ops; `declines` gives the reason not to, or None. A context manager
    that ends the registration.
    """

    name: str
    ops: frozenset[str]
    devices: frozenset[str] | None
    declines: Callable[[Facts], str | None]
    lower: Lower
    version: str = ""

    def remove(self) -> None:
        """Take it out of the table; what was compiled with it stays compiled."""
        with _lock:
            if self in PROVIDERS:
                PROVIDERS.remove(self)
            _failed.pop(self, None)

    def __enter__(self) -> "Provider":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


@dataclasses.dataclass(frozen=True)
class Choice:
    """The provider of one call, and (provider, reason) for each that was asked before it."""

    provider: str
    declined: tuple[tuple[str, str], ...]


# In the order they are asked.
PROVIDERS: list[Provider] = []
# Those that raised, and what.
_failed: dict[Provider, str] = {}
_lock = threading.RLock()


def register_provider(
    name: str,
    run: Run | None = None,
    *,
    ops: Iterable[str],
    devices: Iterable[str] | None = None,
    declines: Callable[[Facts], str | None] = takes_all,
    lower: Lower | None = None,
    version: str | None = None,
) -> Provider:
    """Enter a kernel library, or a target, for some of fxfuse's ops; the newest is asked first.

    Example:
        def run(*, x, weight, eps, record, **rest):
            return None, mylib.rms_norm(x, weight, eps)

        def declines(facts):
            plain = facts.record.addends == 1 and facts.record.norm.has_weight
            return None if plain else "mylib adds nothing up"

        with fxfuse.register_provider("mylib", run, ops=["add_rms_norm"], devices=["cuda"],
                                      declines=declines):
            compiled(x)

    run       a function of tensors that computes what the op does: it gets the op's arguments
              (`fxfuse.ops`, `fxfuse.add_norm`, `fxfuse.attention`) by their names, with the
              record itself, and returns the op's results, None for one that is empty. Compiled
              graphs call it and do not look into it; it may be captured in a CUDA graph.
    lower     instead of `run`: a function of the op's name, its arguments as Inductor's boxes and
              the record, that returns the results as boxes
    ops       which of norm_rope, norm_rope_store_, project_norm_rope_store_, add_rms_norm and
              decode_attention it takes
    devices   device types it is for, such as "cuda" (ROCm too) or "cpu"; None is every one
    declines  why it does not take a call, or None where it does: it must decline wherever it would
              compute something else than the op
    version   what changes when the code does, for Inductor's caches; by default the source of the
              module that `run` or `lower` stands in

    Which sites are fused at all is the gate's decision, not a provider's. One that raises, while it
    declines, lowers or runs, is asked no more, and a warning says so once; the next one is asked.
    Mutates: the table; the result's `remove()`, or the end of a `with`, takes it out again.
    Errors: FxfuseError for a wrong name, unknown ops, or a name that stands for one of them
        already.
    """
    wanted = frozenset(ops)
    _check(name, wanted)
    if (run is None) == (lower is None):
        raise FxfuseError("fxfuse.register_provider: wanted run, or lower in its place")
    code = f"{_source(run or lower)}{_source(declines)}" if version is None else version
    digest = hashlib.sha256(f"{name} {code}".encode()).hexdigest()[:16]
    placed = frozenset(devices) if devices is not None else None
    if run is not None:
        lower = opaque.entered(f"{name}_{digest}", wanted, run, lambda *what: drop(provider, *what))
    assert lower is not None
    provider = Provider(name, wanted, placed, declines, lower, digest)
    _enter(provider)
    return provider


def _enter(provider: Provider) -> None:
    with _lock:
        for other in PROVIDERS:
            if other.name == provider.name and other.ops & provider.ops:
                raise FxfuseError(
                    f"fxfuse.register_provider: {provider.name} is registered for "
                    f"{', '.join(sorted(other.ops & provider.ops))}; remove() that one first"
                )
        PROVIDERS.insert(0, provider)


def _check(name: str, ops: frozenset[str]) -> None:
    if not name.isidentifier():
        raise FxfuseError(f"fxfuse.register_provider: name is {name!r}, wanted an identifier")
    if not ops or not ops <= set(OPS):
        raise FxfuseError(
            f"fxfuse.register_provider: ops are {sorted(ops)}, wanted some of {', '.join(OPS)}"
        )


def _source(function: Any) -> str:
    """The source of the module a function stands in; its own code where that has no file."""
    function = getattr(function, "func", function)
    try:
        return inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return repr((code.co_code, code.co_names, code.co_consts) if code else function)


def drop(provider: Provider, doing: str, error: Exception) -> None:
    """Ask a provider no more, and warn once."""
    reason = (str(error).splitlines() or [""])[0]
    with _lock:
        if provider in _failed:
            return
        _failed[provider] = f"failed {doing}: {type(error).__name__}: {reason}"
    log.warning("fxfuse: provider %s is asked no more, it %s", provider.name, _failed[provider])
    log.debug("provider %s", provider.name, exc_info=error)


def failures() -> int:
    """How many providers have raised so far."""
    return len(_failed)


def failure_of(provider: Provider) -> str | None:
    """What a provider raised, so that it is asked no more; None where it did not."""
    return _failed.get(provider)


def table_tag() -> str:
    """The table as text, for the keys of Inductor's caches."""
    return ",".join(f"{p.name}:{p.version}:{p in _failed}" for p in PROVIDERS)


def choose(device_type: str, facts: Facts) -> Choice:
    """The provider that takes a call on a device type ("cuda" is ROCm too)."""
    return _asked(device_type, facts)[1]


def named(name: str, facts: Facts) -> Provider | None:
    """The provider of this name, where it takes a call on a GPU."""
    found = (p for p in PROVIDERS if p.name == name and facts.op in p.ops)
    return next((p for p in found if _reason(p, "cuda", facts) is None), None)


def _asked(device_type: str, facts: Facts) -> tuple[Provider, Choice]:
    declined: list[tuple[str, str]] = []
    for provider in [p for p in PROVIDERS if facts.op in p.ops]:
        reason = _reason(provider, device_type, facts)
        if reason is None:
            return provider, Choice(provider.name, tuple(declined))
        declined.append((provider.name, reason))
    raise LookupError(f"fxfuse: no provider takes {facts.op} on {device_type}: {declined}")


def _reason(provider: Provider, device_type: str, facts: Facts) -> str | None:
    """Why a provider does not take a call, or None."""
    if provider in _failed:
        return _failed[provider]
    if provider.devices is not None and device_type not in provider.devices:
        return f"not for {device_type}"
    try:
        return provider.declines(facts)
    except Exception as error:
        drop(provider, "declining", error)
        return _failed[provider]


@contextlib.contextmanager
def asked_first(provider: Provider) -> Iterator[None]:
    """Inside, a provider of the table is asked before all others."""
    with _lock:
        before = list(PROVIDERS)
        PROVIDERS[:] = [provider, *(p for p in before if p is not provider)]
    try:
        yield
    finally:
        with _lock:
            PROVIDERS.sort(key=before.index)


# The arguments whose dtypes are facts.
TOLD = (
    "x", "residual", "second", "weight", "q", "k", "v", "q_proj", "k_proj", "v_proj", "k_cache",
    "v_cache", "mask",
)  # fmt: skip


def facts_of(record: AnyRecord, tensors: Mapping[str, Any]) -> Facts:
    """Facts from an op's tensors, or fakes of them, by the names of its arguments."""
    given = {name: x for name, x in tensors.items() if isinstance(x, Tensor) and name in TOLD}
    dtypes, first = {name: x.dtype for name, x in given.items()}, next(iter(given.values()))
    if isinstance(record, AddNorm):
        shape = tuple(map(_number, first.shape))
        return Facts(record, shape=shape, dtypes=dtypes, device=first.device)
    if isinstance(record, DecodeAttention):
        batch = _number(first.shape[0])
        return Facts(record, batch=batch, dtypes=dtypes, device=first.device)
    source, axis = ("{}_proj", 0) if record.projected else ("{}", 2)
    streams = [given.get(source.format(name)) for name in ("q", "k", "v")]
    heads = tuple(None if x is None else _number(x.shape[axis]) for x in streams)
    return Facts(record, heads, _number(first.shape[0]), dtypes=dtypes, device=first.device)


def _number(size: Any) -> int | None:
    return size if isinstance(size, int) else None


# What each lowered call got, newest last.
chosen: list[Choice] = []

_starts_anew = contextvars.ContextVar("_starts_anew", default=False)


@contextlib.contextmanager
def starting_anew() -> Iterator[None]:
    """Inside, a provider that fails to lower ends the compile: who is here compiles again. Else the
    next provider goes on with the graph that the failed one leaves.
    """
    token = _starts_anew.set(True)
    try:
        yield
    finally:
        _starts_anew.reset(token)


def _lower(name: str, *args: Any) -> Any:
    from fxfuse.lowering import inductor

    record = OPS[name](args[-1])
    facts = facts_of(record, dict(zip(arguments(name), inductor.fakes(), strict=True)))
    device_type = facts.device.type if facts.device else "cpu"
    while True:
        taker, choice = _asked(device_type, facts)
        try:
            results = taker.lower(name, args, record)
        except Exception as error:
            last = taker is [p for p in PROVIDERS if name in p.ops][-1]
            if last:
                raise
            drop(taker, "lowering", error)
            if _starts_anew.get():
                raise
            continue
        chosen.append(choice)
        return results


@functools.cache
def arguments(name: str) -> tuple[str, ...]:
    """The names of an op's arguments."""
    return tuple(a.name for a in getattr(torch.ops.fxfuse, name).default._schema.arguments)


@functools.cache
def register() -> None:
    """Hand the ops to Inductor; call before compile_fx. Once a process is enough."""
    from fxfuse.lowering import inductor

    for name in OPS:
        op = getattr(torch.ops.fxfuse, name).default
        inductor.register_op(op, functools.partial(_lower, name))

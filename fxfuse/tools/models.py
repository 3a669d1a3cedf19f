"""The model that a command is given: found offline, built, and its arguments.

In: a word of the command line. Out: a `Given`, whose `call` holds the arguments of one call.
"""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxfuse.bench.arguments import positive
from fxfuse.settings import FxfuseError
from fxfuse.tiny.inputs import PROMPT, inputs_of
from fxfuse.tiny.model import new_cache, takes_cache, tiny_model, why_no_static_cache
from fxfuse.tiny.units import Unit, units_of

CACHES = ("static", "dynamic", "none")
# Slots of a static cache beside those of the call's own tokens.
SLOTS = 32
TOKENS_WITHOUT_CACHE = 16
# Nothing is fetched, and what transformers would say is not this command's.
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
WANTED = (
    "wanted a class of transformers (Qwen3, Qwen3ForCausalLM), one of its rotary models "
    "(qwen3, qwen3_vl.text), a config.json, a folder that has one, or a name in the Hugging Face "
    "cache (nothing is fetched)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Enter what says how a model is built and called."""
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="the GPU if there is one")
    add("--random-weights", action="store_true", help="build a config instead of loading weights")
    add("--layers", type=positive, metavar="N", help="depth of a config, instead of its own")
    add("--cache", choices=CACHES, help="of keys and values; static where the model takes one")
    add("--tokens", type=positive, metavar="N", help="in the call: 1 with a cache, 16 without")


@dataclasses.dataclass(frozen=True)
class Given:
    """A model, and `inputs(tokens)` on its device."""

    name: str
    model: Any
    inputs: Callable[[int], dict[str, Any]]

    @torch.no_grad()
    def call(self, cache: str | None, tokens: int | None) -> tuple[dict[str, Any], str]:
        """The arguments of a call, and what it is in words; for a cache a prompt has been run."""
        if cache is None and takes_cache(self.model):
            try:
                return self._cached("static", tokens or 1)
            except Exception:  # a model that takes no static cache says so in its own way
                return self._cached("dynamic", tokens or 1)
        if cache in (None, "none"):
            count = tokens or TOKENS_WITHOUT_CACHE
            off = {"use_cache": False} if takes_cache(self.model) else {}
            return self.inputs(count) | off, "no cache" + self._counted(count)
        if not takes_cache(self.model):
            raise FxfuseError(f"--cache {cache}: {self.name} takes no cache; use --cache none")
        if cache == "static" and (reason := why_no_static_cache(self.model)):
            raise FxfuseError(f"--cache static: {reason}; use --cache dynamic")
        return self._cached(str(cache), tokens or 1)

    def _cached(self, kind: str, tokens: int) -> tuple[dict[str, Any], str]:
        cache = new_cache(self.model, kind, SLOTS + tokens, self.inputs(1))
        self.model(**self.inputs(PROMPT), past_key_values=cache, use_cache=True)
        given = self.inputs(tokens) | {"past_key_values": cache, "use_cache": True}
        slots = f" of {SLOTS + tokens} slots" if kind == "static" else ""
        return given, f"{kind} cache{slots}" + self._counted(tokens)

    def _counted(self, tokens: int) -> str:
        if not {"input_ids", "inputs_embeds"} & self.inputs(1).keys():
            return ""
        return f", {tokens} token{'s' if tokens > 1 else ''}"


def given(args: argparse.Namespace) -> Given:
    """The model of a command line, in eval mode on its device."""
    if importlib.util.find_spec("transformers") is None:
        raise FxfuseError(
            f"{args.model}: a model is built by transformers, which is not installed: "
            "pip install transformers, or give a Python script"
        )
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    device = device_of(args.device)
    unit = unit_of(args.model)
    model: Any = tiny_model(unit) if unit else _from_config(args)
    model = model.eval().requires_grad_(False).to(device)
    made_for = unit.name if unit else ""

    def inputs(tokens: int) -> dict[str, Any]:
        def moved(x: Any) -> Any:
            wide = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(device, model.dtype if wide else None) if isinstance(x, Tensor) else x

        made: dict[str, Any] = pytree.tree_map(moved, inputs_of(made_for, model, tokens))
        return made

    parts = [type(model).__name__, "tiny, random weights" if unit else "", *_sizes(model), device]
    return Given(", ".join(part for part in parts if part), model, inputs)


def device_of(name: str | None) -> str:
    """The device asked for, or the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FxfuseError("--device cuda, but torch sees no GPU")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _sizes(model: Any) -> tuple[str, str]:
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", None)
    depth = f"{layers} layer{'s' if layers > 1 else ''}" if layers else ""
    return depth, str(model.dtype).removeprefix("torch.")


def unit_of(word: str) -> Unit | None:
    """The tiny model of a name, or None where the word is a path or a name of the hub's."""
    if "/" in word or Path(word).exists():
        return None
    folder = word.partition(".")[0]
    if folder.islower() and word in (units := units_of(folder)):
        return units[word]
    transformers = importlib.import_module("transformers")
    for suffix in ("", "ForCausalLM", "Config", "Model", "TextConfig"):
        found = getattr(transformers, word + suffix, None)
        if isinstance(found, type) and (unit := _unit_of_class(found)):
            return unit
    close = difflib.get_close_matches(word, dir(transformers), 3)
    near = f" (near it: {', '.join(close)})" if close else ""
    raise FxfuseError(f"no model {word!r}{near}; {WANTED}")


def _unit_of_class(found: type) -> Unit | None:
    """The unit of a model class or of its config; of a class that is no unit, one made for it."""
    folder = found.__module__.removeprefix("transformers.models.").partition(".")[0]
    units = list(units_of(folder).values())
    for unit in units:
        if found in (unit.model_class(), unit.model_class().config_class):
            return unit
    config = getattr(found, "config_class", None)
    if config is None or found.__module__.count(".") < 3:
        return None
    alike = (unit.name for unit in units if unit.model_class().config_class is config)
    return Unit(next(alike, folder), found.__module__, found.__name__)


def _from_config(args: argparse.Namespace) -> Any:
    """A model of a config that lies on this machine, with its weights or random ones."""
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(args.model, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FxfuseError(f"no config in {args.model}: {reason}; {WANTED}") from None
    _cut(config, args.layers)
    name = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise FxfuseError(f"{args.model}: transformers has no {name}; is it new enough?")
    if args.random_weights:
        torch.manual_seed(0)
        make = getattr(architecture, "_from_config", None) or architecture.from_config
        return make(config, dtype=getattr(config, "dtype", None) or torch.float32)
    try:
        return architecture.from_pretrained(
            args.model, config=config, dtype="auto", local_files_only=True
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FxfuseError(f"{reason}; --random-weights builds the config without them") from None


def _cut(config: Any, layers: int | None) -> None:
    """Fewer layers, and as many entries of the lists that have one for each."""
    if layers is None:
        return
    text = config.get_text_config(decoder=True)
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == count:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = min(layers, count)

"""Which models there are: each class of transformers whose file has rotary embeddings.

In: the installed transformers. Out: `Unit`s by name. A unit is one model class of one rotary
modeling file with a config class of its own: `qwen3` is the causal model of that file,
`qwen3_vl.text` and `qwen3_vl.vision` are two towers. A `whole` unit (`qwen3_vl.full`) is put
together from others.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROTARY = re.compile(r"rotary|rotate_half|freqs_cis|apply_.*rope|rotate_queries", re.IGNORECASE)

# Of several model classes with one config class, the first of these endings is taken.
ENDINGS = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "TextModel",
    "LanguageModel",
    "VisionModel",
    "VisionTransformer",
    "AudioModel",
    "Encoder",
    "Model",
    "Transformer",
    "Decoder",
)

# The first of these in a config's name tags the unit; else the whole name does.
TAGS = (
    "text",
    "vision",
    "audio",
    "depth",
    "talker",
    "codepredictor",
    "encoder",
    "decoder",
    "vq",
    "qformer",
    "tracker",
    "memory",
    "geometry",
    "detector",
)

# Where the endings choose a class that does not rotate.
PREFERRED = {"DINOv3ViTModel", "Sapiens2Model"}

# Further units: a second class of one config, or a spelling that a flag of the config turns on.
FURTHER = {
    "blt": {"lm": "BltForCausalLM"},
    "chameleon": {"lm": "ChameleonForConditionalGeneration"},
    "cohere": {"qknorm": "CohereForCausalLM"},
    "csm": {"backbone": "CsmBackboneModel"},
    "deepseek_v3": {"nointerleave": "DeepseekV3ForCausalLM"},
    "evolla": {"lm": "EvollaForProteinText2Text"},
    "glm4_moe": {"qknorm": "Glm4MoeForCausalLM"},
    "idefics": {"lm": "IdeficsModel"},
    "moonshine": {"decoder": "MoonshineDecoder"},
    "moonshine_streaming": {"decoder": "MoonshineStreamingDecoder"},
    "moshi": {"lm": "MoshiForCausalLM"},
    "phi": {"qknorm": "PhiForCausalLM"},
    "phi4_multimodal": {"lm": "Phi4MultimodalForCausalLM"},
    "qwen3": {"sliding": "Qwen3ForCausalLM"},
    "stablelm": {"qknorm": "StableLmForCausalLM"},
}


@dataclass(frozen=True)
class Unit:
    """One model class: `module` is imported to find `model` in it. `rounds` names a dtype in which
    the model computes whatever dtype it is given: results differ by its roundings.
    """

    name: str
    module: str
    model: str
    library: str = "transformers"
    whole: bool = False
    rounds: str = ""

    @property
    def arch(self) -> str:
        return self.name.partition(".")[0]

    def model_class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.model)


def architectures() -> list[str]:
    """Folders of transformers with a rotary modeling file, in alphabetical order."""
    return sorted({path.parent.name for path in _rotary_files("*")} - {"auto"})


def units_of(arch: str) -> dict[str, Unit]:
    """Every unit of one folder of transformers."""
    units: dict[str, Unit] = {}
    for path in _rotary_files(arch):
        module = f"transformers.models.{arch}.{path.stem}"
        for unit in _units_in(arch, module, taken=units):
            units[unit.name] = unit
    return units


def transformers_units(archs: Iterable[str] | None = None) -> dict[str, Unit]:
    """Every unit of transformers, or of the folders named: causal models, text towers, the rest."""
    found = [u for arch in archs or architectures() for u in units_of(arch).values()]
    return {u.name: u for u in sorted(found, key=_order)}


def _order(unit: Unit) -> tuple[bool, int]:
    text = 0 if unit.model.endswith("ForCausalLM") else 1 if "Text" in unit.model else 2
    return unit.whole, text


def _rotary_files(arch: str) -> list[Path]:
    import transformers

    root = Path(transformers.__file__).parent / "models"
    return [p for p in sorted(root.glob(f"{arch}/modeling_*.py")) if ROTARY.search(p.read_text())]


def _units_in(arch: str, module: str, taken: Iterable[str]) -> Iterator[Unit]:
    """The units of one file; a name that is taken already gives way to the config's own."""
    names = set(taken)
    by_config = _models_by_config(module)
    towers = [c for c in by_config if not _is_composite(c)] or list(by_config)
    for config in towers:
        model = _chosen(by_config[config], composite=_is_composite(config))
        name = _name(arch, model, config, names, alone=len(towers) == 1)
        names.add(name)
        yield Unit(name, module, model)
    for config in (c for c in by_config if c not in towers):
        model = _chosen(by_config[config], composite=True)
        yield Unit(f"{arch}.full", module, model, whole=True)
    for tag, model in FURTHER.get(arch, {}).items():
        yield Unit(f"{arch}.{tag}", module, model)


def _models_by_config(module: str) -> dict[Any, list[str]]:
    """Names of the model classes that a file defines, by config class, in the file's order."""
    from transformers import PreTrainedModel

    found: dict[Any, list[str]] = {}
    for name, member in vars(importlib.import_module(module)).items():
        if not (isinstance(member, type) and issubclass(member, PreTrainedModel)):
            continue
        is_base = name.endswith("PreTrainedModel") or name.startswith("PreTrained")
        if member.__module__ == module and not is_base and member.config_class is not None:
            found.setdefault(member.config_class, []).append(name)
    return found


def _is_composite(config: Any) -> bool:
    return bool(getattr(config, "sub_configs", None))


def _chosen(models: list[str], composite: bool) -> str:
    def rank(model: str) -> int:
        if model in PREFERRED:
            return -1
        # The class that generates belongs to a composite config; on a tower it is a subclass.
        skip = () if composite else ("ForConditionalGeneration",)
        places = (i for i, e in enumerate(ENDINGS) if e not in skip and model.endswith(e))
        return next(places, len(ENDINGS) + len(model))

    return min(models, key=rank)


def _name(arch: str, model: str, config: Any, taken: set[str], alone: bool) -> str:
    own = config.__name__.removesuffix("Config").lower()
    if alone or model.endswith("ForCausalLM"):
        name = arch
    else:
        name = f"{arch}.{next((t for t in TAGS if t in config.__name__.lower()), own)}"
    return f"{arch}.{own}" if name in taken else name

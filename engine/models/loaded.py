"""How a pipeline was loaded: what an engine can work with as it is, and what it refuses, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from rollflow.errors import ModelError, line
from rollflow.models.borrowed import networks_of

DENOISERS = ("transformer", "transformer_2")
_LIBRARIES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "optimum": "quanto", "gguf": "gguf"}
_OFFLOADS = ("CpuOffload", "UserCpuOffloadHook", "GroupOffloadingHook", "LazyPrefetchGroupOffloadingHook")


class Loaded(NamedTuple):
    """What is special about a pipeline, and supported.

    Attributes:
        adapters: LoRA layers of its denoisers, with their rank and targets. They are part of the velocity, with the
            weights that are set when an engine is made.
        quantized: how the denoisers' weights are quantized; the velocity is that of the quantized network.
        compiled: whether blocks of the denoisers are compiled.
    """

    adapters: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    compiled: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is a network of torch's own operations, which can be recorded."""
        return not self.quantized and not self.compiled

    @property
    def graphable(self) -> bool:
        """Whether the quantized operations can be part of a CUDA graph: others may wait for the device."""
        return set(self.quantized) <= {"torchao"}


def loaded(pipeline: Any) -> Loaded:
    """Looks at a pipeline before anything is learned of it.

    Supported are LoRA, quantized weights (torchao, bitsandbytes, gguf, quanto), compiled blocks, and device maps of one
    device.

    Raises:
        ModelError: it is offloaded, cast layer by layer, cached from step to step, parallel, or compiled as a whole;
            or its parts are on several devices, or their weights nowhere.
    """
    kind, parts = type(pipeline).__name__, networks_of(pipeline)
    for name, part in parts.items():
        for reason in _refusals(name, part):
            raise ModelError(f"the pipeline {kind} cannot be used as it is: {reason}")
    _check_devices(kind, pipeline, parts)
    own = [part for name, part in parts.items() if name in DENOISERS]
    adapters = [adapter for part in own for adapter in _adapters(part)]
    quantized = dict.fromkeys(method for part in own for method in _quantized(part))
    return Loaded(tuple(adapters), tuple(quantized), any(map(is_compiled, own)))


def is_compiled(network: nn.Module) -> bool:
    """Whether modules of it are compiled."""
    return any(module._compiled_call_impl is not None for module in network.modules())


def _refusals(name: str, part: nn.Module) -> Iterator[str]:
    for hook in _hooks(part):
        yield from _refused_hook(name, hook)
    if getattr(part, "_cache_config", None) is not None:
        yield _cached(name, type(part._cache_config).__name__)
    if getattr(part, "_parallel_config", None) is not None:
        yield f"{name} is split over processes, and an engine runs in one: load it without enable_parallelism"
    if name in (*DENOISERS, "vae") and _whole_compiled(part):
        yield (
            f"{name} is compiled as a whole, which would be done again for every batch size, and holds its graphs for "
            f"one thread: compile what it repeats, by pipeline.{name}.compile_repeated_blocks(), on the plain module"
        )


def _refused_hook(name: str, hook: Any) -> Iterator[str]:
    kind = type(hook).__name__
    if kind in _OFFLOADS or getattr(hook, "offload", False):
        yield (
            f"{name} is offloaded ({kind}), which moves weights during a call, and an engine makes calls from several "
            "threads: load it without offloading and move it by .to(device); smaller in memory are quantized weights, "
            "and Engine.release_text_encoders()"
        )
    elif "LayerwiseCasting" in kind:
        yield (
            f"{name} casts its weights layer by layer ({kind}), in place during a call, and an engine makes calls from "
            "several threads: load it without enable_layerwise_casting, or with quantized weights"
        )
    elif getattr(hook, "_is_stateful", False):
        yield _cached(name, kind)


def _cached(name: str, what: str) -> str:
    return (
        f"{name} keeps results from step to step ({what}), and rows of a batch are at steps of their own: call "
        f"pipeline.{name}.disable_cache()"
    )


def _hooks(part: nn.Module) -> Iterator[Any]:
    """Those of accelerate and of diffusers."""
    for module in part.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if hook is not None:
            yield from getattr(hook, "hooks", (hook,))
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            yield from registry.hooks.values()


def _whole_compiled(part: nn.Module) -> bool:
    own = vars(part).get("forward")
    compiled = part._compiled_call_impl is not None or hasattr(own, "_torchdynamo_orig_callable")
    return compiled or type(part).__name__ == "OptimizedModule"


def _check_devices(kind: str, pipeline: Any, parts: dict[str, nn.Module]) -> None:
    where = {name: sorted({device_of(parameter) for parameter in part.parameters()}) for name, part in parts.items()}
    if nowhere := [name for name, devices in where.items() if "meta" in devices]:
        raise ModelError(
            f"the pipeline {kind} has no weights in {line(', '.join(nowhere), 100)} (they are on the device meta): "
            "load it whole, without offloading"
        )
    if len({device for devices in where.values() for device in devices}) > 1:
        found = ", ".join(f"{name} on {' and '.join(devices)}" for name, devices in where.items() if devices)
        mapped = "pipeline.reset_device_map() and then " if getattr(pipeline, "hf_device_map", None) else ""
        raise ModelError(
            f"the pipeline {kind} is spread over devices ({line(found, 200)}), and an engine works on one: call "
            f"{mapped}pipeline.to(device), or make one engine a device"
        )


def device_of(parameter: nn.Parameter) -> str:
    """The name of the device that weights are on."""
    return str(parameter.device)


def _adapters(part: nn.Module) -> Iterator[str]:
    known: dict[str, Any] = getattr(part, "peft_config", None) or {}
    for name, config in known.items():
        targets = getattr(config, "target_modules", None) or ()
        targets = targets if isinstance(targets, str) else sorted(targets)
        yield f"{name} r={getattr(config, 'r', None)} {targets}"


def _quantized(part: nn.Module) -> Iterator[str]:
    """The methods by which a network's weights are quantized, as it declares them or as their types show."""
    quantizer: Any = getattr(part, "hf_quantizer", None)
    method: Any = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if method is not None:
        yield str(getattr(method, "value", method))
    for parameter in part.parameters():
        packages = f"{type(parameter).__module__}.{type(parameter.data).__module__}".split(".")
        yield from (method for package, method in _LIBRARIES.items() if package in packages)

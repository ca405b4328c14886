"""Many adapters under one Hugging Face model, each sequence of a batch with its own.

    engine = polylora.attach(model)
    engine.load("upper", "adapters/upper")
    engine.load("rot13", "adapters/rot13")
    with engine.batch(["upper", None, "rot13"]):
        model.generate(**three_prompts)
    engine.detach()

Nothing is merged and no weight is copied or changed. Linears and embeddings get a forward hook that adds to the
module's own output in place; experts get another ``forward`` (:mod:`polylora.engines.hf_experts`). Both act only inside
:meth:`HfEngine.batch`, and there only where an adapter of the batch has weights: everything else is the model as it
was, bit for bit. Within a mixed batch the linears of base sequences keep their bits too; experts that an adapter of the
batch touches are computed by other (grouped) GEMMs for all its sequences, so there base sequences agree up to rounding.

A batch belongs to the thread and asyncio task that opened it, and to what inherits their :mod:`contextvars`
(``asyncio.to_thread``, tasks made inside it). While it is open, forwards from elsewhere are refused: they would get its
adapters. ``batch(names, any_thread=True)`` lets all in, for ``generate`` in a second thread with a streamer.

A layer must see its rows sequence by sequence, ``[sequences, tokens, ...]`` or flattened from it, as decoders without
sequence packing do. Tied weights need no care: an adapter of ``lm_head`` or of the embedding acts on the module it
names, as in PEFT. Inference only.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from polylora._library import has_cuda_kernels
from polylora.adapters import MAX_RANK, AdapterError, AdapterWeights, load_adapter
from polylora.layers import BatchPlans, EmbeddingSite, LinearSite
from polylora.models import Site, model_table
from polylora.pool import AdapterPool, SlotInUse

from .base_weights import base_weight_problems
from .errors import EngineError
from .hf_experts import ExpertsSite, UnsupportedExperts

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The engine of each model that has one. The hooks on the model keep it alive.
_attached: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[HfEngine]] = weakref.WeakKeyDictionary()
# What stands for each batch opened in this context; one an engine at most.
_opened: ContextVar[tuple[object, ...]] = ContextVar("polylora_batches", default=())


@dataclass
class _Running:
    """The batch that is running.

    Attributes:
        plans: of its sequences.
        touched: sites that any adapter in it touches.
        owner: is in ``_opened`` where forwards may come from; None when from anywhere.
        rows: sequences a forward may have: those named, in ``generate`` also what each becomes.
    """

    plans: BatchPlans
    touched: frozenset[str]
    owner: object | None
    rows: frozenset[int]

    def refuse_strangers(self) -> None:
        if self.owner is not None and self.owner not in _opened.get():
            raise EngineError(
                "polylora.HfEngine.batch: this forward must come from the thread (or asyncio task) that opened the "
                "running batch, got another; an engine runs one batch at a time: run it from one thread, or open it "
                "with any_thread=True if this forward is part of it"
            )


def attach(
    model: torch.nn.Module,
    *,
    max_adapters: int = 8,
    max_rank: int = MAX_RANK,
    dtype: torch.dtype | None = None,
) -> HfEngine:
    """Puts adapters under ``model``; :class:`HfEngine` says what the arguments are and what is refused."""
    return HfEngine(model, max_adapters=max_adapters, max_rank=max_rank, dtype=dtype)


class HfEngine:
    """Serves adapters by name on one ``transformers`` causal language model.

    Attributes:
        model: the model, unchanged but for hooks.
        table: its sites, one a module (:func:`polylora.models.model_table`).
        pool: where the adapters are (:class:`polylora.AdapterPool`).

    Usable as a context manager that detaches at its end. One batch at a time, and one engine a model; :meth:`of` finds
    it again. An attached model cannot be copied or pickled (``copy.deepcopy``, ``torch.save`` of the model itself):
    detach first, or save its ``state_dict()``, which has nothing of the engine in it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        max_adapters: int = 8,
        max_rank: int = MAX_RANK,
        dtype: torch.dtype | None = None,
    ):
        """
        Args:
            model: of a family that :func:`polylora.models.known_model_types` lists, on one device, in ``eval()``.
            max_adapters: adapters loaded at a time.
            max_rank: adapters with a larger rank are refused at load.
            dtype: of the adapters' weights here; the dtype of the model's linears when None.

        Raises:
            polylora.models.UnknownModelError: no table for this family.
            EngineError: it is no model of transformers, is training, wrapped or adapted by PEFT, attached already,
                spread over devices, on a GPU that this build has no kernels for, or its modules are not those that the
                table expects.
        """
        if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
            raise EngineError(
                f"polylora.attach: model must be a transformers model that is loaded, got {type(model).__name__}"
            )
        if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
            raise EngineError("polylora.attach: model must be without PEFT adapters, got one with; unload them first")
        if HfEngine.of(model) is not None:
            raise EngineError(
                "polylora.attach: model must not be attached already; use or detach its engine, HfEngine.of(model)"
            )
        _refuse_training(model, "polylora.attach: model")
        self.model = model
        self.table = model_table(model, fused=False)
        modules = self._modules()
        self.device = _one_device(modules.values())
        if self.device.type == "cuda" and not has_cuda_kernels():
            raise EngineError("polylora.attach: model must be on the CPU, this build has no CUDA kernels (no nvcc)")
        _refuse_old_gpu(self.device)
        self.dtype = dtype or _dtype_of(next(iter(modules.values())))
        if self.dtype not in _DTYPES:
            raise EngineError(f"polylora.attach: dtype must be bfloat16, float16 or float32, got {self.dtype}")
        self.pool = AdapterPool(
            self.table, dtype=self.dtype, device=self.device, max_adapters=max_adapters, max_rank=max_rank
        )
        self._touches: dict[str, frozenset[str]] = {}
        self._running: _Running | None = None
        self._lock = threading.Lock()
        self._undo: list[Callable[[], None]] = []
        self._unservable: dict[str, str] = {}
        try:
            self._attach(modules)
        except BaseException:
            self._restore()
            raise
        _attached[model] = weakref.ref(self)

    @staticmethod
    def of(model: torch.nn.Module) -> HfEngine | None:
        """The engine that is attached to a model, or None."""
        found = _attached.get(model)
        return found() if found is not None else None

    # ------------------------------------------------------------------------------------------------ attaching

    def _modules(self) -> dict[str, torch.nn.Module]:
        """The module of each site (for experts the one that holds the parameter), by site path."""
        there = dict(self.model.named_modules())
        paths = {p: p.rpartition(".")[0] if site.experts else p for p, site in self.table.sites.items()}
        missing = [path for path in paths.values() if path not in there]
        if missing:
            raise EngineError(
                f"polylora.attach: model must have the modules of {self.table.model_type!r}, {len(missing)} are "
                f"missing: {', '.join(missing[:4])}"
            )
        return {path: there[module] for path, module in paths.items()}

    def _attach(self, modules: dict[str, torch.nn.Module]) -> None:
        experts: dict[str, dict[str, Site]] = {}
        for path, site in self.table.sites.items():
            module = modules[path]
            if site.experts:
                experts.setdefault(path.rpartition(".")[0], {})[site.kind] = site
                continue
            reason = self._problem(module, site)
            if reason:
                self._unservable[path] = reason
            elif site.kind == "embedding":
                self._hook(module, EmbeddingSite(self.pool, path))
            else:
                self._hook(module, LinearSite(self.pool, path))
        for pair in experts.values():
            self._replace_experts(modules[pair["moe_gate_up"].path], pair["moe_gate_up"], pair["moe_down"])
        decoder = modules[next(p for p, s in self.table.sites.items() if s.kind == "embedding")]
        decoder = next((m for m in self.model.modules() if decoder in m.children()), self.model)
        for module in {self.model, decoder}:
            handle = module.register_forward_pre_hook(self._check_forward, with_kwargs=True)
            self._undo.append(handle.remove)
        self._note_generate()

    def _problem(self, module: torch.nn.Module, site: Site) -> str | None:
        """Why adapters cannot be served on this module, or None."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            return f"{type(module).__name__} has no weight"
        # A quantised weight says nothing about the dtype of its output; the op checks that.
        if weight.dtype in _DTYPES:
            if weight.dtype != self.dtype:
                return f"its weight is {weight.dtype}, the engine's dtype is {self.dtype}"
            expected = (site.k, site.width) if site.kind == "embedding" else (site.width, site.k)
            if tuple(weight.shape) != expected:
                return f"its weight must be {list(expected)}, got {list(weight.shape)}"
        return None

    def _hook(self, module: torch.nn.Module, site: LinearSite | EmbeddingSite) -> None:
        # Of the class: who sets another forward on the instance must take what it takes.
        name = next(iter(list(inspect.signature(type(module).forward).parameters)[1:]), "input")

        def hook(_module, args, kwargs, output):
            running = self._running
            if running is None or site.path not in running.touched:
                return None
            # A compiled model asks at its forward alone: dynamo cannot trace the question.
            if not torch.compiler.is_compiling():
                running.refuse_strangers()
            x = args[0] if args else kwargs.get(name)
            if not isinstance(x, torch.Tensor):
                raise EngineError(f"polylora: {site.path}: must be called with {name}, got {sorted(kwargs) or 'none'}")
            if output.dtype != self.dtype:
                raise EngineError(
                    f"polylora: {site.path}: its output must be {self.dtype}, the engine's dtype, got {output.dtype}; "
                    "under autocast, load the model in autocast's dtype or switch autocast off"
                )
            if x.is_floating_point() and x.dtype != self.dtype:
                x = x.to(self.dtype)  # as autocast did for the layer
            return site.add_(output, x, running.plans)

        handle = module.register_forward_hook(hook, with_kwargs=True)
        self._undo.append(handle.remove)

    def _replace_experts(self, module: torch.nn.Module, gate_up: Site, down: Site) -> None:
        paths = (gate_up.path, down.path)

        def batch() -> BatchPlans | None:
            running = self._running
            if running is None or running.touched.isdisjoint(paths):
                return None
            if not torch.compiler.is_compiling():
                running.refuse_strangers()
            return running.plans

        try:
            weights = {getattr(module, path.rpartition(".")[2]).dtype for path in paths}
            if weights != {self.dtype}:
                raise UnsupportedExperts(f"its parameters are {weights}, the engine's dtype is {self.dtype}")
            site = ExpertsSite(module, gate_up, down, self.pool, batch)
        except (UnsupportedExperts, AttributeError) as error:
            self._unservable.update(dict.fromkeys(paths, f"{type(module).__name__}: {error}"))
            return
        self._override(module, "forward", site.replacement(module.forward))

    def _override(self, module: torch.nn.Module, name: str, function: Callable) -> None:
        """Sets a method on the instance. Undone to what the instance had, which is usually nothing; left as it is
        where somebody else has set another since."""
        had, before = name in module.__dict__, module.__dict__.get(name)

        def undo() -> None:
            if module.__dict__.get(name) is not function:
                return
            if had:
                module.__dict__[name] = before
            else:
                del module.__dict__[name]

        module.__dict__[name] = function
        self._undo.append(undo)

    def _note_generate(self) -> None:
        """``generate`` must get as many prompts as were named. Beams and ``num_return_sequences`` repeat each: only
        there, and only by their number, a forward may have more sequences."""
        original = getattr(self.model, "generate", None)
        if original is None:
            return

        @functools.wraps(original)
        def generate(*args, **kwargs):
            running = self._running
            if running is None:
                return original(*args, **kwargs)
            running.refuse_strangers()
            prompts, sequences = _prompts(args, kwargs), running.plans.sequences
            if prompts != sequences:
                raise EngineError(
                    "polylora.HfEngine.batch: generate must get a prompt for each name (beams and return sequences "
                    f"are not named), {sequences} sequences, got {prompts}"
                )
            # All prompts are there: whatever is more is an expansion. Not every version's is done before prefill.
            before = running.rows
            running.rows = before | {sequences * _expansion(self.model, args, kwargs)}
            try:
                return original(*args, **kwargs)
            finally:
                running.rows = before

        self._override(self.model, "generate", generate)

    def _check_forward(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        running = self._running
        if running is None:
            return
        running.refuse_strangers()
        _refuse_training(module, "polylora.HfEngine.batch: model")
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")] + list(args[:1])
        tensor = next((t for t in given if isinstance(t, torch.Tensor)), None)
        if tensor is None or tensor.shape[0] in running.rows:
            return
        raise EngineError(
            f"polylora.HfEngine.batch: the model must get the batch that was named, {running.plans.sequences} "
            f"sequences, got {tensor.shape[0]}"
        )

    def detach(self) -> None:
        """Takes everything off the model again; the engine is of no use afterwards. Does nothing the second time.

        A ``generate`` or ``forward`` that somebody else has set over the engine's stays. What it calls of the engine's
        is then the model's own.

        Raises:
            EngineError: a batch is running.
        """
        with self._lock:
            if self._running is not None:
                raise EngineError("polylora.HfEngine.detach: leave the running batch first")
            try:
                self._restore()
            finally:
                if HfEngine.of(self.model) is self:
                    del _attached[self.model]

    def _restore(self) -> None:
        """Undoes all, whatever fails, and then raises the first failure."""
        failed: list[BaseException] = []
        while self._undo:
            try:
                self._undo.pop()()
            except BaseException as error:
                failed.append(error)
        if failed:
            raise failed[0]

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    def __enter__(self) -> HfEngine:
        return self

    def __exit__(self, *_error) -> None:
        self.detach()

    # ------------------------------------------------------------------------------------------------ adapters

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters, by slot."""
        return self.pool.names

    def sites(self, name: str) -> frozenset[str]:
        """Paths of the sites an adapter touches. Raises polylora.pool.UnknownAdapter."""
        self.pool.slot(name)
        return self._touches[name]

    def load(self, name: str, adapter: str | os.PathLike | AdapterWeights) -> None:
        """Loads an adapter under ``name``; possible inside a batch, between two forwards. All or nothing.

        Args:
            name: that :meth:`batch` will know it by.
            adapter: a PEFT folder, or weights bound to :attr:`table`. A base weight saved in a folder
                (``<module>.base_layer.weight``) must be the model's own, rounded to its dtype; PEFT would load another
                into the base model. Bound weights no longer say whether there was one.

        Raises:
            polylora.adapters.AdapterError: the adapter is damaged, does not fit this model, or cannot be served
                exactly; every reason is named.
            ValueError: the name is taken.
            polylora.pool.PoolFull: ``max_adapters`` are loaded.
        """
        self._refuse_detached("load")
        with torch.inference_mode(False), torch.no_grad():
            folder = None
            if isinstance(adapter, AdapterWeights):
                adapter = AdapterWeights(name, adapter.sites)
            else:
                folder, adapter = adapter, load_adapter(adapter, self.table, name)
            reasons = [f"{site}: {self._unservable[site]}" for site in adapter.sites if site in self._unservable]
            if folder is not None and not reasons:
                reasons = base_weight_problems(folder, self._weight_of)
            if adapter.max_rank > self.pool.max_rank:
                reasons.append(
                    f"rank must be at most max_rank = {self.pool.max_rank}, got {adapter.max_rank}; polylora.attach "
                    f"takes another max_rank"
                )
            if reasons:
                raise AdapterError(name, reasons)
            self.pool.load(adapter)
        self._touches[name] = frozenset(adapter.sites)

    def _weight_of(self, path: str) -> torch.Tensor:
        """The weight of a module that an adapter names in its own spelling, and that its table has."""
        feeds = self.table.feeds
        site = next(feeds[p][0][0] for p in self.table.spellings(path) if p in feeds)
        return self.model.get_submodule(site).weight

    def unload(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            polylora.pool.UnknownAdapter: no such name.
            polylora.pool.SlotInUse: the running batch uses it.
        """
        self._refuse_detached("unload")
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.pool.unload(name)
        except SlotInUse:
            raise SlotInUse(
                f"polylora.HfEngine.unload: adapter {name!r} must not be in use, the running batch has it; leave that "
                f"first"
            ) from None
        del self._touches[name]

    @contextmanager
    def batch(self, names: Sequence[str | None], *, any_thread: bool = False) -> Iterator[None]:
        """Inside it, sequence i of every forward and of ``model.generate`` runs with adapter ``names[i]``.

        Args:
            names: one a sequence; None = the base model.
            any_thread: forwards from other threads and asyncio tasks are of this batch too, and must not run at the
                same time. Without it they are refused until the batch ends.

        ``generate`` takes one prompt a name; beams and return sequences of a prompt share its adapter. Adapters in use
        cannot be unloaded.

        Raises:
            polylora.pool.UnknownAdapter: a name that is not loaded (a LookupError that lists those that are).
            EngineError: another batch is running, or the engine is detached. In forwards and ``generate``: the batch
                has another size, or they come from another thread; also, a layer's output has another dtype than the
                engine (autocast).
        """
        self._refuse_detached("batch")
        if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
            raise TypeError(f"polylora.HfEngine.batch: names must be a list of adapter names or None, got {names!r}")
        names = list(names)
        if not names:
            raise ValueError("polylora.HfEngine.batch: names must be one a sequence, got none")
        with self._lock:
            if self._running is not None:
                raise EngineError("polylora.HfEngine.batch: batches cannot nest or overlap; leave the running one")
            slots = self.pool.acquire(names)
            try:
                plans = BatchPlans(slots, self.pool.max_adapters, self.device)
                touched = frozenset().union(*(self._touches[name] for name in names if name is not None))
            except BaseException:
                self.pool.release(names)
                raise
            owner = None if any_thread else object()
            self._running = _Running(plans, touched, owner, frozenset({len(names)}))
        if owner is not None:
            _opened.set((*_opened.get(), owner))
        try:
            yield
        finally:
            # Not by a token: the batch may be left in another context than it was entered in.
            _opened.set(tuple(each for each in _opened.get() if each is not owner))
            with self._lock:
                self._running = None
                self.pool.release(names)

    def _refuse_detached(self, method: str) -> None:
        if not self._undo:
            raise EngineError(f"polylora.HfEngine.{method}: the engine is detached; attach a new one")


def _refuse_old_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        raise EngineError(
            f"polylora.attach: model must be on a GPU of compute capability 8.0 or later, or on the CPU, got "
            f"{major}.{minor}"
        )


def _refuse_training(model: torch.nn.Module, what: str) -> None:
    if model.training:
        raise EngineError(f"{what} must be in eval mode, got training; adapters are served for inference only")


def _prompts(args: tuple, kwargs: dict) -> int:
    """Sequences that a call of ``generate`` is given; without any it starts one by itself."""
    given = [kwargs.get("inputs_embeds"), *args[:1]]
    given += [kwargs.get(name) for name in ("inputs", "input_ids", "attention_mask")]
    return next((len(t) for t in given if isinstance(t, torch.Tensor)), 1)


def _expansion(model: torch.nn.Module, args: tuple, kwargs: dict) -> int:
    """Sequences that a call of ``generate`` makes of each prompt."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    default = getattr(model, "generation_config", None)

    def value(name: str) -> int:
        given = [kwargs.get(name), getattr(config, name, None), getattr(default, name, None)]
        return next((v for v in given if v is not None), 1)

    return max(value("num_beams"), value("num_return_sequences"))


def _dtype_of(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _one_device(modules) -> torch.device:
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise EngineError(
            f"polylora.attach: model must be on one CPU or CUDA device, got {sorted(map(str, devices)) or 'none'}"
        )
    return next(iter(devices))

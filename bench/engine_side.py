"""One side of the engine benchmark, in a process of its own: ``python engine_side.py SPEC.json RECORDS.jsonl``.

:class:`Vllm` and :class:`Worker` are all that touches vLLM; the rest takes anything with Vllm's methods.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

#: Decode steps left out after the first one in which all requests decode.
SETTLE = 4
#: Steps after those that a time per output token is made of, at least.
LEAST_STEPS = 4
#: Tokens of a step, unless there are more requests.
STEP_TOKENS = 8192
WRAPPERS = {
    "base": set(),
    "vllm": {"vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"},
    "polylora": {"polylora.vllm_plugin.wrapper.PolyloraPunicaWrapper"},
}
LOGPROBS = 10
_NO_KERNEL = re.compile(r"cu(da)?[A-Z]|Mem(cpy|set)|Activity Buffer|Lazy ")  # what the profiler lists beside kernels


class Request(NamedTuple):
    name: str
    prompt: list[int]
    output: int
    adapter: int | None  # which of the spec's, None: the base model
    logprobs: int | None = None


class WrongKernels(RuntimeError):
    """The engine does not run the kernels that it was to be measured with."""


def requests(batch: int, prompt: int, output: int, adapters: int, logprobs: int | None = None) -> list[Request]:
    """``batch`` requests of random tokens; request i has adapter i mod ``adapters`` (0: none has)."""
    rng = random.Random(batch * prompt)
    tokens = [[rng.randrange(10, 1000) for _ in range(prompt)] for _ in range(batch)]
    return [Request(str(i), t, output, i % adapters if adapters else None, logprobs) for i, t in enumerate(tokens)]


def measure(engine: Any, batch: Sequence[Request], clock: Callable[[], float] = time.perf_counter) -> dict:
    """Runs a batch, submitted at once; times in ms.

    Returns ``ttft``, the requests' mean, and ``ttft_last``, until all have their first token; where more than one token
    was asked for ``tpot``, the mean of the steady decode steps, ``step``, their median, and ``steps``, how many.

    Raises RuntimeError where the requests do not decode together for long enough.
    """
    start = clock()
    for request in batch:
        engine.add(request)
    first: dict[str, float] = {}
    runs: list[list[float]] = [[]]  # ends of successive steps that gave each request one token
    while engine.busy():
        outputs, now = engine.step(), clock()
        if not outputs:
            continue
        decoding = len(first) == len(batch)
        for name, tokens, _ in outputs:
            if tokens:
                first.setdefault(name, now)
        if decoding and len(outputs) == len(batch) and all(len(tokens) == 1 for _, tokens, _ in outputs):
            runs[-1].append(now)
        elif runs[-1]:
            runs.append([])
    waits = [1e3 * (time_ - start) for time_ in first.values()]
    found = {"ttft": sum(waits) / len(waits), "ttft_last": max(waits), "tpot": None, "step": None, "steps": 0}
    if batch[0].output == 1:
        return found
    ends = max(runs, key=len)[SETTLE:]
    if len(ends) < LEAST_STEPS:
        raise RuntimeError(f"{len(batch)} requests decoded together for {len(ends)} steps after {SETTLE}, "
                           f"need {LEAST_STEPS}")  # fmt: skip
    steps = sorted(1e3 * (b - a) for a, b in zip(ends, ends[1:], strict=False))
    mean = 1e3 * (ends[-1] - ends[0]) / len(steps)
    return found | {"tpot": mean, "step": steps[len(steps) // 2], "steps": len(steps)}


def least_output(batch: int, prompt: int, step_tokens: int = STEP_TOKENS) -> int:
    """Tokens that requests, submitted at once, have to decode for the first to be there long enough after the prompt of
    the last: prompts take ``step_tokens`` a step, less one for each request that decodes already."""
    return -(-batch * prompt // max(step_tokens - batch, 1)) + SETTLE + LEAST_STEPS


def generate(engine: Any, batch: Sequence[Request]) -> dict[str, dict[str, list]]:
    """Runs a batch; by request its ``tokens`` and, a token, the ``logprobs`` as [token, value] pairs."""
    found = {r.name: {"adapter": r.adapter, "prompt": r.prompt, "tokens": [], "logprobs": []} for r in batch}
    for request in batch:
        engine.add(request)
    while engine.busy():
        for name, tokens, logprobs in engine.step():
            found[name]["tokens"] += tokens
            found[name]["logprobs"] += [sorted(of_token.items()) for of_token in logprobs or []]
    return found


def check_wrappers(side: str, found: dict[str, int]) -> None:
    """``found``: layers by the class of their wrapper, as :meth:`Worker.bench_wrappers` counts them."""
    if set(found) != WRAPPERS[side]:
        raise WrongKernels(f"layers must have the wrapper {WRAPPERS[side] or 'none'}, got {found or 'none'}")


def check_kernels(side: str, adapters: int, found: dict[str, int]) -> None:
    """``found``: launches of a batch as :func:`count_kernels` returns them; all 0 where the profiler sees none."""
    wrong = {"base": found["polylora"] + found["vllm"], "vllm": found["polylora"], "polylora": 0}[side]
    if wrong or (found["all"] and adapters and not found[side]):
        raise WrongKernels(f"with {adapters} adapters LoRA kernels must be {side}'s, launches were {found}")


def run(spec: dict, engine: Any, record: Callable[[dict], None], say: Callable[[str], None]) -> None:
    """The side's cells, or its part of a comparison.

    Args:
        spec: ``side``, ``cells`` [adapters, batch, prompt, output], ``repeat``; or ``compare`` [adapters, batch,
            prompt, output].
        engine: as :class:`Vllm`.
    """
    side = spec["side"]
    wrappers = engine.rpc("bench_wrappers")
    check_wrappers(side, wrappers)
    record({"kind": "wrapper", "side": side, "layers": wrappers} | engine.rpc("bench_versions"))
    if spec["compare"]:
        adapters, batch, prompt, output = spec["compare"]
        rows = requests(batch, prompt, output, adapters + 1, LOGPROBS)  # one prompt for the base and all adapters
        rows = [r._replace(prompt=rows[i // (adapters + 1)].prompt) for i, r in enumerate(rows)]
        rows = [r._replace(adapter=r.adapter - 1 if r.adapter else None) for r in rows]
        record({"kind": "generated", "side": side, "alone": False, "requests": generate(engine, rows)})
        if side == "vllm":  # how far it is from itself, in batches of other sizes
            alone = {r.name: generate(engine, [r._replace(name="0")])["0"] for r in rows}
            record({"kind": "generated", "side": side, "alone": True, "requests": alone})
        if not spec["compile"]:  # hooks run in eager passes alone: prompts, where nothing is compiled
            engine.rpc("bench_check_start")
            generate(engine, [r._replace(output=1) for r in rows])
            record({"kind": "layers", "side": side, "layers": engine.rpc("bench_check_stop")})
    for i, (adapters, batch, prompt, output) in enumerate(spec["cells"]):
        say(f"{side}: {i + 1} of {len(spec['cells'])}: batch {batch}, {adapters} adapters, prompt {prompt}")
        cell = {"kind": "engine", "side": side, "adapters": adapters, "batch": batch, "prompt": prompt}
        try:
            generate(engine, requests(batch, prompt, min(output, 8), adapters))  # compiles, loads, captures
            samples = [measure(engine, requests(batch, prompt, output, adapters)) for _ in range(spec["repeat"])]
            record(cell | {"status": "ok", "output": output, "samples": samples})
        except RuntimeError as error:
            record(cell | {"status": "error", "output": output, "detail": str(error)})
            if engine.busy():
                raise
    engine.rpc("bench_profile_start")
    shape = spec["compare"] or max(spec["cells"])  # most adapters
    generate(engine, requests(shape[1], shape[2], 4, shape[0]))
    launches = engine.rpc("bench_profile_stop")
    record({"kind": "kernels", "side": side, "launches": launches})
    say(f"{side}: kernels that the profiler saw: {launches}")
    check_kernels(side, shape[0], launches)


def settings(spec: dict) -> dict[str, Any]:
    """What vLLM's ``LLM`` is given. Nothing in it needs a network, a tokenizer, flashinfer or weights."""
    config = json.loads((Path(spec["model"]) / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    batch = max(spec["batches"])
    found = {
        "model": spec["model"], "load_format": spec["weights"], "skip_tokenizer_init": True, "dtype": "bfloat16",
        "seed": 0, "generation_config": "vllm", "enable_prefix_caching": False, "disable_log_stats": True,
        "max_model_len": spec["length"], "max_num_seqs": batch, "max_num_batched_tokens": max(STEP_TOKENS, batch),
        "gpu_memory_utilization": 0.85, "worker_extension_cls": "engine_side.Worker",
        "compilation_config": {"cudagraph_capture_sizes": spec["batches"]},
    }  # fmt: skip
    if not spec["compile"]:
        found["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if "text_config" in config:
        found["language_model_only"] = True
    if "linear_attention" in text.get("layer_types", []):
        found["gdn_prefill_backend"] = "triton"
    if spec["side"] != "base":
        room = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= max(spec["ranks"]))
        slots = spec["slots"]
        found |= {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": room}
    return found | spec["engine"]


class Vllm:
    """vLLM's engine, its adapters loaded."""

    def __init__(self, spec: dict) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._llm = LLM(**settings(spec))
        self._engine, self._count = self._llm.llm_engine, 0
        if spec["weights"] == "dummy":
            self.rpc("bench_spread_weights")
        self._adapters = []
        if spec["side"] != "base":
            self._adapters = [LoRARequest(f"a{i}", i + 1, path) for i, path in enumerate(spec["adapters"])]
        for adapter in self._adapters:
            self._engine.add_lora(adapter)

    def add(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._count += request.name == "0"  # names of a batch come back with later ones
        params = SamplingParams(temperature=0.0, max_tokens=request.output, ignore_eos=True, detokenize=False,
                                logprobs=request.logprobs, output_kind=RequestOutputKind.DELTA)  # fmt: skip
        adapter = None if request.adapter is None else self._adapters[request.adapter]
        name, prompt = f"{self._count}:{request.name}", {"prompt_token_ids": request.prompt}
        self._engine.add_request(name, prompt, params, lora_request=adapter)

    def step(self) -> list[tuple[str, list[int], list[dict[int, float]] | None]]:
        found = [(o.request_id.split(":")[1], o.outputs[0]) for o in self._engine.step()]
        values = [[{t: p.logprob for t, p in at.items()} for at in o.logprobs or []] for _, o in found]
        return [(name, list(o.token_ids), v) for (name, o), v in zip(found, values, strict=True)]

    def busy(self) -> bool:
        return self._engine.has_unfinished_requests()

    def rpc(self, method: str) -> dict[str, Any]:
        return self._llm.collective_rpc(method)[0]


class Worker:
    """Methods that vLLM adds to its workers (``worker_extension_cls``)."""

    def bench_wrappers(self) -> dict[str, int]:
        wrappers = [getattr(module, "punica_wrapper", None) for module in self.get_model().modules()]
        return dict(Counter(f"{type(w).__module__}.{type(w).__qualname__}" for w in wrappers if w is not None))

    def bench_versions(self) -> dict[str, str]:
        import torch
        import vllm

        # vLLM sends plain types alone between its processes, and torch's version is of a class of its own
        return {"vllm": vllm.__version__, "torch": str(torch.__version__), "device": torch.cuda.get_device_name()}

    def bench_spread_weights(self) -> dict[str, int]:
        """Scales vLLM's dummy weights, which lie within 1e-3, until layers pass on values around 1.

        Otherwise the model's logits are all alike, and no token says anything about the kernels. In place: CUDA graphs
        stay valid; the same factors on every side.
        """
        import torch

        count = 0
        with torch.inference_mode():
            for name, weight in self.get_model().named_parameters():
                if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                    continue
                if weight.dim() > 1:
                    weight.mul_(1e3 * (3 / weight.shape[-1]) ** 0.5)  # of variance 1 / inputs
                elif "norm" in name:
                    weight.fill_(1.0)
                count += 1
        return {"weights": count}

    def bench_check_start(self) -> dict[str, int]:
        import engine_check

        self._bench_check = engine_check.LayerCheck(self.get_model())
        return {}

    def bench_check_stop(self) -> dict[str, dict[str, float]]:
        return self._bench_check.stop()

    def bench_profile_start(self) -> dict[str, int]:
        from torch.profiler import ProfilerActivity, profile

        self._bench_profile = profile(activities=[ProfilerActivity.CUDA])
        self._bench_profile.start()
        return {}

    def bench_profile_stop(self) -> dict[str, int]:
        import torch

        torch.cuda.synchronize()
        self._bench_profile.stop()
        return count_kernels({event.key: event.count for event in self._bench_profile.key_averages()})


def count_kernels(launches: dict[str, int]) -> dict[str, int]:
    """Launches of all kernels, of polylora's, of vLLM's for LoRA, from those by the kernel's name."""
    launches = {name: count for name, count in launches.items() if not _NO_KERNEL.match(name)}
    ours = sum(count for name, count in launches.items() if "polylora" in name)
    vllms = sum(count for name, count in launches.items() if name.startswith(("_lora_", "_fused_moe_lora")))
    return {"all": sum(launches.values()), "polylora": ours, "vllm": vllms}


def main(spec_file: str, records_file: str) -> int:
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    with open(records_file, "w", encoding="utf-8") as lines:
        say(f"{spec['side']}: starting the engine: {settings(spec)}")
        try:
            run(spec, Vllm(spec), lambda record: print(json.dumps(record), file=lines, flush=True), say)
        except WrongKernels as error:
            say(f"{spec['side']}: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

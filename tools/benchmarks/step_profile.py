"""`profile`: where a step's time goes, by kind of work and as a flame graph.

The arm is that of `step`, in this process, with torch's profiler around some of its steps. On an
accelerator the times are those of its kernels, on a CPU those of the operators. Beside each kind
stands the least time that it can take at this machine's rates (`roofline.py`).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.benchmarks import flame, step
from tools.benchmarks.record import Record
from tools.benchmarks.roofline import Rates, Work, measured_rates, step_work
from tools.benchmarks.workload import Workload, export, shape_variables

if TYPE_CHECKING:
    from megatron.training.device import Device

WARM_UP = 3  # steps
BACKWARD = "autograd::engine::evaluate_function: "
OPTIMIZER = "Optimizer.step"
KINDS = {
    "communication": r"gloo:|nccl|c10d::|all_?reduce|all_?gather|reduce_?scatter",
    "attention": r"scaled_dot_product|flash|fmha|flex_attention",
    "GEMM": r"aten::(_?addmm|mm|bmm|baddbmm|linear|_scaled_mm|mkl\w*)\b|mkldnn_linear|gemm|cutlass",
    "loss": r"softmax|nll_loss|cross_entropy",
    "optimizer": r"adam|_foreach_|linalg_vector_norm|clip_grad",
    "embedding": r"embedding|index_",
    "copies and casts": r"aten::(copy_|_?to_copy|clone|cat|contiguous|fill_|zero_|_?pin_memory)"
    r"|Memcpy|Memset",
    "elementwise, norms": r"aten::|triton_|fused",
    "dispatch": r"",
}
"""Kind -> names of operators and kernels; the first that is found counts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--shape", default="40m", help="a name, or VARIABLE=value,...")
    parser.add_argument("--dtype", default="fp32", choices=("bf16", "fp32"))
    parser.add_argument("--arm", default="ours", help="as those of `step`")
    parser.add_argument("--steps", type=int, default=3, help="with and without the profiler")
    parser.add_argument("--threads", type=int, default=0, help="of OpenMP; 0: torch's choice")
    parser.add_argument("--trace", action="store_true", help="also write the profiler's own trace")


def main(options: argparse.Namespace) -> int:
    """Profiles and prints; 2 where the arm cannot run."""
    why = step.missing(options.arm)
    if why:
        print(f"{options.arm}: {why}")
        return 2
    if options.threads:  # before torch is imported
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    _with_variables(step.environment_of(options.arm))
    from megatron.training.device import detect, prepare

    work = Workload(shape_variables(options.shape), options.dtype)
    run = work.run()
    device = detect(0, run.train.dtype, run.launch.device)
    prepare(device, run.train.dtype)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        if options.arm in step.PEERS:
            export(work, Path(folder))
        work = Workload(work.variables, work.dtype, Path(folder))
        watched = Watched(device, options.steps, scopes=not compiles(options.arm))
        step.function_of(options.arm)(watched, work)  # type: ignore[arg-type]
    rates = measured_rates(device, run.train.dtype)
    record = report(watched, options, run.model.padded_vocab_size(), step_work(run), rates)
    record.write(options.out)
    if options.out is not None and options.trace:
        watched.profiler.export_chrome_trace(str(options.out / "trace.json.gz"))
    return 0


def _with_variables(needed: Mapping[str, str]) -> None:
    """Begins this program anew with what it lacks: the C library reads it as it is loaded."""
    if not needed.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**needed, **os.environ})


def compiles(arm: str) -> bool:
    """Whether an arm compiles: names of its modules would then break its graphs."""
    return ("compile" in arm.lower() and "COMPILE=0" not in arm) or arm == "litgpt"


class Watched:
    """Stands for `Rounds`: warm-up, then steps on the clock, then steps under the profiler.

    Args:
        device: waited for before the clock is read.
        steps: on the clock, and under the profiler.
        scopes: name the modules in the profile.
    """

    def __init__(self, device: Device, steps: int, *, scopes: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if device.kind != "cpu":
            activities.append(getattr(ProfilerActivity, device.kind.upper()))
        self.device, self.steps = device, steps
        self.profiler: Any = profile(activities=activities, record_shapes=True)
        self.seconds = self.profiled_seconds = 0.0
        self._count, self._since, self._scopes = 0, 0.0, scopes
        self._undo: Callable[[], None] = lambda: None

    def wait(self) -> bool:
        """The loop may begin."""
        return True

    def done(self, loss: Any) -> bool:
        """A step is done; True: another one is wanted."""
        del loss
        self._count += 1
        last = WARM_UP + 2 * self.steps
        if self._count in (WARM_UP, WARM_UP + self.steps, last):
            self.device.synchronize()
            now = time.perf_counter()
            if self._count == WARM_UP + self.steps:
                self.seconds = (now - self._since) / self.steps
                if self._scopes:
                    self._undo = name_modules()
                self.profiler.__enter__()
            elif self._count == last:
                self.profiled_seconds = (now - self._since) / self.steps
                self.profiler.__exit__(None, None, None)
                self._undo()
            self._since = time.perf_counter()
        return self._count < last


def name_modules() -> Callable[[], None]:
    """Every module's forward pass is a range of the profile; returns what ends that."""
    from torch.autograd.profiler import record_function
    from torch.nn.modules import module as modules

    open_ranges: list[record_function] = []

    def begin(module: Any, inputs: Any) -> None:
        del inputs
        open_ranges.append(record_function(type(module).__name__))
        open_ranges[-1].__enter__()

    def end(module: Any, inputs: Any, output: Any) -> None:
        del module, inputs, output
        open_ranges.pop().__exit__(None, None, None)

    handles = [
        modules.register_module_forward_pre_hook(begin),
        modules.register_module_forward_hook(end),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def report(
    watched: Watched,
    options: argparse.Namespace,
    vocab_size: int,
    work: Mapping[str, Work],
    rates: Rates,
) -> Record:
    """The tables, and the flame graph's files.

    Args:
        watched: the steps.
        options: of the subcommand.
        vocab_size: padded.
        work: of a step by kind.
        rates: of this machine.
    """
    events = [event for event in watched.profiler.events() if _is_host(event)]
    on_host = watched.device.kind == "cpu"
    times = [_own_time(event, on_host) / watched.steps / 1e3 for event in events]  # ms
    kinds, operators = defaultdict[str, float](float), defaultdict[str, float](float)
    calls = Counter[str]()
    for event, ms in zip(events, times, strict=True):
        kind = kind_of(event, vocab_size)
        kinds[kind] += ms
        calls[kind] += int(ms > 0)
        operators[event.name.removeprefix(BACKWARD)] += ms
    wall = watched.profiled_seconds * 1e3
    if not on_host:
        kinds["dispatch"] = 0.0  # it is beside the kernels
        kinds["kernels of no operator"] = _kernel_ms(watched) - sum(kinds.values())
    rest = "Python, not traced" if on_host else "device idle"
    kinds[rest] = wall - sum(kinds.values())
    name = re.sub(
        r"\W+", "-", f"profile-{options.arm}-{options.shape.split(',')[0]}-{options.dtype}"
    )
    record = Record(
        name,
        f"Where a step's time goes: {options.arm}, {options.shape}, {options.dtype}",
        ("kind", "ms a step", "at least", "share", "calls a step"),
    )
    least = {kind: 1e3 * one.seconds(rates) for kind, one in work.items()}
    for kind, ms in largest(kinds):
        if abs(ms) > 0.0005 * wall:
            bound = f"{least[kind]:.2f}" if kind in least else ""
            count = f"{calls[kind] / watched.steps:.0f}"
            record.rows.append((kind, f"{ms:.2f}", bound, f"{ms / wall:.1%}", count))
    top = ", ".join(f"{op} {ms / wall:.1%}" for op, ms in largest(operators)[:12])
    record.notes = [
        f"a step takes {watched.seconds * 1e3:.1f} ms, {wall:.1f} ms under the profiler, of which "
        "the shares are",
        f"most time in {top}",
        f"at least {sum(least.values()):.1f} ms a step, by {rates.flops / 1e12:.3f} TFLOP/s of "
        f"large products and {rates.memory / 1e9:.1f} GB/s of memory, measured after it",
    ]
    record.data = {
        "step_ms": watched.seconds * 1e3,
        "profiled_step_ms": wall,
        "kinds_ms": dict(kinds),
        "least_ms": least,
        "rates": rates._asdict(),
        "operators_ms": dict(largest(operators)[:60]),
    }
    if options.out is not None:
        stacks = folded(events, times)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.folded").write_text(flame.folded_text(stacks))
        (options.out / f"{name}.svg").write_text(flame.svg(stacks, record.about))
        record.notes.append(f"flame graph: {name}.svg, stacks: {name}.folded")
    return record


def largest(times: Mapping[str, float]) -> list[tuple[str, float]]:
    """The entries, the largest first."""
    return sorted(times.items(), key=lambda item: -item[1])


def kind_of(event: Any, vocab_size: int) -> str:
    """The kind of an operator: its place, its shapes, its name.

    Args:
        event: of the profiler.
        vocab_size: tensors of this width that are no product of matrices are of the loss.
    """
    name = event.name
    if any(above.name.startswith(OPTIMIZER) for above in _upwards(event)):
        return "optimizer"
    kind = next(kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE))
    wide = any(shape and shape[-1] == vocab_size for shape in event.input_shapes or ())
    return "loss" if wide and kind in ("elementwise, norms", "copies and casts") else kind


def folded(events: Sequence[Any], times: Sequence[float]) -> Mapping[tuple[str, ...], float]:
    """Stack, outermost first -> ms of its own per step.

    An operator of the backward pass stands below the modules of the forward operator that it
    belongs to, which the profiler knows by sequence numbers.
    """
    modules: dict[int, tuple[str, ...]] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            names = [above.name for above in _upwards(event)]
            scopes = tuple(n for n in reversed(names) if "::" not in n and "Backward" not in n)
            if len(scopes) >= len(modules.get(event.sequence_nr, ())):
                modules[event.sequence_nr] = scopes
    found: dict[tuple[str, ...], float] = defaultdict(float)
    for event, ms in zip(events, times, strict=True):
        if ms <= 0:
            continue
        stack: tuple[str, ...] = ()
        for above in reversed([*_upwards(event)]):
            if above.name.startswith(BACKWARD):
                stack = ("backward", *modules.get(above.sequence_nr, ()))
            stack = (*stack, above.name.removeprefix(BACKWARD))
        found[stack] += ms
    return found


def _upwards(event: Any) -> Iterator[Any]:
    """The event and what it is in, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_host(event: Any) -> bool:
    return bool(event.device_type.name == "CPU") and not event.is_async


def _own_time(event: Any, on_host: bool) -> float:
    """Microseconds, without what is inside it."""
    return float(event.self_cpu_time_total if on_host else event.self_device_time_total)


def _kernel_ms(watched: Watched) -> float:
    """Of all kernels, per step."""
    kernels = (e for e in watched.profiler.events() if e.device_type.name != "CPU")
    return sum(event.time_range.elapsed_us() for event in kernels) / watched.steps / 1e3

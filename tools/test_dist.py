#!/usr/bin/env python3
"""Do these ranks work together? `python3 -m megatron.launch -n 4 -- python3 tools/test_dist.py`

Works under any launcher. A line a rank, every collective checked for its values on every rank and
timed, then a small network trained on all ranks. Status: 0; 1 a wrong value, the error names
collective and rank; 2 a wrong setting.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import itertools
import os
import pstats
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

import torch
import torch.distributed as dist

from megatron.analysis.plot import plot
from megatron.config.errors import ConfigError
from megatron.engine import start_distributed, stop_distributed
from megatron.launch.accelerators import promise
from megatron.launch.rank_process import run_to_end
from megatron.launch.ranks import Ranks, find_ranks, rendezvous
from megatron.launch.site import find_location
from megatron.parallel.meeting import MeetingError
from megatron.training.device import Device, detect, prepare

TIMEOUT_S = 120.0
BARRIER_S = 0.1  # the last rank comes this much later
WIDTHS = (1024, 512, 256, 128)  # hidden layers of the network
METRICS = ("loss", "sps", "dt", "dtf", "dtb")


@dataclass(frozen=True)
class Place:
    """This rank among all, and its device."""

    rank: int
    size: int
    device: Device

    def values(self, rank: int, count: int) -> torch.Tensor:
        """`count` whole numbers, different on each rank, whose sums are exact in fp32."""
        here = torch.arange(count, device=self.device.torch_device) % 61
        return (here + 64 * (rank + 1)).float()

    def empty(self, count: int) -> torch.Tensor:
        return torch.full((count,), -1.0, device=self.device.torch_device)

    def total(self, count: int) -> torch.Tensor:
        """The sum over all ranks of their values."""
        return torch.stack([self.values(rank, count) for rank in range(self.size)]).sum(0)

    @property
    def root(self) -> int:
        """The rank that has or gets all: not 0, which is what a mistake would give."""
        return self.size - 1


@dataclass(frozen=True)
class Trial:
    """A collective on its buffers: what runs it, where its result is, and what that has to be."""

    run: Callable[[], Any]
    result: torch.Tensor | None = None
    expected: torch.Tensor | None = None


def all_reduce(place: Place, count: int) -> Trial:
    """On every rank the sum over ranks."""
    data = place.values(place.rank, count)
    return Trial(lambda: dist.all_reduce(data), data, place.total(count))


def reduce(place: Place, count: int) -> Trial:
    """On one rank the sum over ranks; the others' buffers are undefined."""
    data = place.values(place.rank, count)
    expected = place.total(count) if place.rank == place.root else None
    return Trial(lambda: dist.reduce(data, dst=place.root), data, expected)


def broadcast(place: Place, count: int) -> Trial:
    """On every rank the values of one."""
    data = place.values(place.rank, count)
    return Trial(
        lambda: dist.broadcast(data, src=place.root), data, place.values(place.root, count)
    )


def all_gather(place: Place, count: int) -> Trial:
    """On every rank the values of all, in rank order."""
    part = count // place.size
    data, found = place.values(place.rank, part), place.empty(part * place.size)
    expected = torch.cat([place.values(rank, part) for rank in range(place.size)])
    pieces = list(found.chunk(place.size))
    return Trial(lambda: dist.all_gather(pieces, data), found, expected)


def scatter(place: Place, count: int) -> Trial:
    """On every rank its piece of one rank's values."""
    part = count // place.size
    data = place.values(place.root, part * place.size)
    pieces, found = list(data.chunk(place.size)), place.empty(part)
    given = pieces if place.rank == place.root else None
    expected = pieces[place.rank].clone()
    return Trial(lambda: dist.scatter(found, given, src=place.root), found, expected)


def reduce_scatter(place: Place, count: int) -> Trial:
    """On every rank its piece of the sum over ranks."""
    part = count // place.size
    data, found = place.values(place.rank, part * place.size), place.empty(part)
    expected = place.total(part * place.size).chunk(place.size)[place.rank]
    return Trial(lambda: dist.reduce_scatter_tensor(found, data), found, expected)


def all_to_all(place: Place, count: int) -> Trial:
    """On every rank, piece r is the piece that rank r had for it."""
    part = count // place.size
    data, found = place.values(place.rank, part * place.size), place.empty(part * place.size)
    pieces = [
        place.values(rank, part * place.size).chunk(place.size)[place.rank]
        for rank in range(place.size)
    ]
    return Trial(lambda: dist.all_to_all_single(found, data), found, torch.cat(pieces))


def send_recv(place: Place, count: int) -> Trial:
    """Round a ring: to the next rank, from the one before."""
    if place.size == 1:
        return Trial(lambda: None)
    data, found = place.values(place.rank, count), place.empty(count)
    before, after = (place.rank - 1) % place.size, (place.rank + 1) % place.size

    def run() -> None:
        both = [dist.P2POp(dist.isend, data, after), dist.P2POp(dist.irecv, found, before)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return Trial(run, found, place.values(before, count))


@dataclass(frozen=True)
class Collective:
    """One row of the table: `traffic` is the share of a buffer that crosses a rank's link."""

    trial: Callable[[Place, int], Trial]
    traffic: Callable[[int], float]


def _once(size: int) -> float:
    return 1.0


def _others(size: int) -> float:
    return (size - 1) / size


COLLECTIVES: dict[str, Collective] = {
    "all_reduce": Collective(all_reduce, lambda size: 2 * _others(size)),
    "reduce": Collective(reduce, _once),
    "broadcast": Collective(broadcast, _once),
    "all_gather": Collective(all_gather, _others),
    "scatter": Collective(scatter, _others),
    "reduce_scatter": Collective(reduce_scatter, _others),
    "all_to_all": Collective(all_to_all, _others),
    "send_recv": Collective(send_recv, _once),
}


def wrong(name: str, trial: Trial, place: Place) -> str:
    """What is wrong with a trial's values on this rank; empty if nothing is."""
    place.device.synchronize()
    if trial.result is None or trial.expected is None:
        return ""
    different = (trial.result != trial.expected).nonzero()
    if not len(different):
        return ""
    at = int(different[0])
    return (
        f"{name} of {trial.result.numel()} numbers is wrong on rank {place.rank}: number {at} is "
        f"{trial.result[at].item():g}, not {trial.expected[at].item():g} "
        f"({len(different)} are wrong)"
    )


def check_barrier(place: Place) -> str:
    """Nobody leaves before the last has come; what is wrong, if so."""
    start = place.empty(1)
    dist.all_reduce(start)  # all are here
    place.device.synchronize()
    began = time.monotonic()
    if place.rank == place.root:
        time.sleep(BARRIER_S)
    dist.barrier()
    waited = time.monotonic() - began
    if waited > BARRIER_S / 2:
        return ""
    return f"barrier is wrong: rank {place.rank} left before the last, {waited:.3f} s after it came"


def check_collectives(place: Place, sizes: Sequence[int], repeats: int) -> list[str]:
    """Check and time every collective; rank 0 prints. Returns what is wrong on this rank.

    Args:
        place: this rank.
        sizes: bytes of the largest buffer of a rank.
        repeats: calls that are timed.
    """
    say = print if place.rank == 0 else _silent
    say(f"\n{'collective':15} {'bytes':>10} {'time us':>10} {'GB/s':>8} {'link GB/s':>9}  values")
    found = []
    for name, collective in COLLECTIVES.items():
        for size in sizes:
            trial = collective.trial(place, max(size // 4, place.size))
            trial.run()
            error = wrong(name, trial, place)
            found += [error] if error else []
            seconds = timed(trial.run, place, repeats)
            rate = size / seconds / 1e9
            link = rate * collective.traffic(place.size)
            checked = "wrong" if error else "right"
            say(f"{name:15} {size:10} {1e6 * seconds:10.1f} {rate:8.3f} {link:9.3f}  {checked}")
    error = check_barrier(place)
    seconds = timed(dist.barrier, place, repeats)
    say(f"{'barrier':15} {'-':>10} {1e6 * seconds:10.1f} {'-':>8} {'-':>9}  "
        f"{'wrong' if error else 'right'}")  # fmt: skip
    say("(GB/s: bytes of a rank's largest buffer per second; link: what crosses a rank's link)")
    return [*found, *([error] if error else [])]


def timed(run: Callable[[], Any], place: Place, repeats: int) -> float:
    """Seconds a call."""
    place.device.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    place.device.synchronize()
    return max((time.perf_counter() - began) / repeats, 1e-9)


LEGEND = """(loss: mean over all ranks; sps: samples of ALL ranks per second; seconds, each waited
for: dt a step, dtf its forward, dtb its backward with the mean of the gradients over ranks)"""


def train(
    place: Place, iterations: int, batch: int, features: int
) -> tuple[list[dict[str, float]], str]:
    """Train a small network to give back its input.

    Returns:
        A record per step, as in LEGEND; and what is wrong with this rank's weights, if anything.
    """
    torch.manual_seed(0)  # the same weights everywhere
    sizes = [features, *WIDTHS, features]
    pairs = itertools.pairwise(sizes)
    layers = [layer for pair in pairs for layer in (torch.nn.Linear(*pair), torch.nn.ReLU())][:-1]
    model = torch.nn.Sequential(*layers).to(place.device.torch_device)
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator().manual_seed(1 + place.rank)  # and different samples
    if place.rank == 0:
        print(f"\nmodel={model}\n{LEGEND}")
    records = []
    for number in range(1, iterations + 1):
        data = torch.randn(batch, features, generator=generator).to(place.device.torch_device)
        place.device.synchronize()
        began = time.perf_counter()
        loss = torch.nn.functional.mse_loss(model(data), data)
        place.device.synchronize()
        forward = time.perf_counter()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        average([parameter.grad for parameter in model.parameters()], place)
        place.device.synchronize()
        backward = time.perf_counter()
        optimizer.step()
        place.device.synchronize()
        record = {
            "iter": float(number),
            "loss": average([loss.detach()], place),
            "dt": (dt := time.perf_counter() - began),
            "sps": batch * place.size / dt,
            "dtf": forward - began,
            "dtb": backward - forward,
        }
        records.append(record)
        if place.rank == 0:
            figures = ", ".join(f"{name}={record[name]:.4g}" for name in METRICS)
            print(f"iter={number}, {figures}")
    mine = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, src=0)
    error = f"training is wrong: the weights of rank {place.rank} are not those of rank 0"
    return records, "" if torch.equal(first, mine) else error


def average(tensors: Sequence[torch.Tensor | None], place: Place) -> float:
    """Their mean over ranks, in place; returns the last one's last number."""
    found = [tensor for tensor in tensors if tensor is not None]
    flat = torch.cat([tensor.reshape(-1) for tensor in found])
    dist.all_reduce(flat)
    flat /= place.size
    for tensor, piece in zip(found, torch.split(flat, [one.numel() for one in found]), strict=True):
        tensor.copy_(piece.view_as(tensor))
    return flat[-1].item()


def dist_info(place: Place, ranks: Ranks, hosts: Sequence[str]) -> dict[str, object]:
    """What is known of the world, by the names of the workshop.

    Args:
        place: this rank.
        ranks: as its launcher numbers it.
        hosts: of each rank, in rank order.
    """
    location, names = find_location(os.environ), list(dict.fromkeys(hosts))
    return {
        "DEVICE": place.device.kind,
        "DEVICE_ID": str(place.device.torch_device),
        "DEVICE_NAME": place.device.name,
        "DISTRIBUTED_BACKEND": place.device.backend,
        "GPUS_PER_NODE": max(hosts.count(name) for name in names),
        "GPUS_PER_NODE_AVAILABLE": location.devices_per_host,
        "HOSTS": names,
        "HOSTFILE": location.job.hostfile,
        "HOSTNAME": location.hostname,
        "LOCAL_RANK": ranks.local_rank,
        "MACHINE": location.machine.name,
        "NUM_NODES": len(names),
        "NGPUS": place.size,
        "NODE_ID": names.index(hosts[place.rank]),
        "RANK": place.rank,
        "SCHEDULER": location.job.scheduler,
        "WORLD_SIZE": place.size,
        "RANK_VARIABLES": ranks.family,
    }


def introduce(place: Place, ranks: Ranks) -> None:
    """A line a rank; rank 0 adds what is known of the world."""
    gathered: list[Any] = [None] * place.size
    dist.all_gather_object(gathered, socket.gethostname())
    info = dist_info(place, ranks, gathered)
    local = gathered.count(gathered[place.rank]) - 1
    line = (
        f"[device='{place.device.kind}'][rank={place.rank}/{place.size - 1}]"
        f"[local_rank={ranks.local_rank}/{local}]"
        f"[node={info['NODE_ID']}/{len(dict.fromkeys(gathered)) - 1}]\n"
    )
    sys.stdout.write(line)  # with its end, so that lines of ranks stay whole
    sys.stdout.flush()
    dist.barrier()
    if place.rank == 0:
        print("\n".join(["[dist_info]:", *(f"  - {key}={info[key]}" for key in info)]), flush=True)


def draw(records: Sequence[Mapping[str, float]], folder: Path | None) -> None:
    """A plot of each metric on the terminal and, where there is a folder, in a text file."""
    for name in METRICS:
        curve = {name: [(record["iter"], record[name]) for record in records]}
        text = plot(curve, f"train/{name}", "iter", 80, 8, sys.stdout.encoding or "ascii")
        print(text)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def profiled(folder: Path | None) -> Iterator[None]:
    """Profile the block's Python; a table for people and a file for tools at its end."""
    if folder is None:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    profile.dump_stats(folder / "profile.pstats")
    with (folder / "profile.txt").open("w", encoding="utf-8") as file:
        pstats.Stats(profile, stream=file).sort_stats("cumulative").print_stats(60)
    print(f"profile of rank 0: {folder / 'profile.txt'}, {folder / 'profile.pstats'}")


def run(place: Place, ranks: Ranks, options: argparse.Namespace) -> int:
    """All of it, on ranks that have met; returns the status."""
    began = time.monotonic()
    introduce(place, ranks)
    leads = place.rank == 0
    with profiled(options.out if options.profile and leads else None):
        errors = check_collectives(place, options.sizes, options.repeats)
        records, error = train(place, options.iterations, options.batch_size, options.features)
        errors += [error] if error else []
    if leads and records:
        draw(records, options.out if options.save_plots else None)
    for error in errors:
        print(f"[rank {place.rank}] error: {error}", file=sys.stderr, flush=True)
    if leads:
        print(f"runtime={time.monotonic() - began:.2f} s, {'wrong' if errors else 'all right'}")
    return 1 if errors else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = [1 << 10, 1 << 16, 1 << 22]
    add("--sizes", type=int, nargs="+", default=sizes, metavar="BYTES", help="of a rank's buffer")
    add("--repeats", type=int, default=5, help="timed calls of each collective and size")
    add("--iterations", type=int, default=20, help="steps of training; 0: none")
    add("--batch-size", type=int, default=64, help="samples a rank and step")
    add("--features", type=int, default=128, help="numbers a sample")
    add("--out", type=Path, default=Path("test-dist"), help="folder of what is written")
    add("--save-plots", action="store_true", help="write the plots to the folder as well")
    add("--profile", action="store_true", help="profile rank 0's Python into the folder")
    return parser.parse_args(argv)


def main(options: argparse.Namespace, ranks: Ranks) -> int:
    """Meet, test, leave."""
    try:
        chosen = os.environ.get("DEVICE", "auto")
        device = detect(ranks.local_rank, "fp32", chosen, promise(os.environ))
        prepare(device, "fp32")
        meeting = rendezvous(os.environ)
        start_distributed(
            device.backend, ranks.rank, ranks.world_size, device.index, meeting, TIMEOUT_S
        )
    except (ConfigError, MeetingError) as error:
        print(f"[rank {ranks.rank}] error: {error}", file=sys.stderr)
        return error.exit_status
    status = run(Place(ranks.rank, ranks.world_size, device), ranks, options)
    stop_distributed()
    return status


def _silent(text: str) -> None: ...


if __name__ == "__main__":
    chosen = parse(None)
    try:
        found = find_ranks(os.environ)
    except ConfigError as refused:
        print(f"error: {refused}", file=sys.stderr)
        raise SystemExit(refused.exit_status) from None
    raise SystemExit(run_to_end(partial(main, chosen, found), os.environ))

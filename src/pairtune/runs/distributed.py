"""The few collective operations that a run needs. Without a process group each is a no-op, so no caller branches."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from pairtune.errors import PairtuneError

BUCKET_BYTES = 25 * 2**20
"""Gradients travel in messages of about this size: large enough to hide latency, small enough to spare memory."""
TIMEOUT = timedelta(hours=12)
"""How long a process waits for the others. The main one alone evaluates and saves, and one may wait for the endpoint of
a judge: minutes, or hours. torch's own limit (10 minutes with NCCL) would take that for a hang and kill the run. A
process that has died is found by its launcher, which then ends the others, whatever stands here."""


def init_from_env(device: str = "auto") -> torch.device | None:
    """Joins the process group that torchrun or `accelerate launch` describes in the environment.

    NCCL with one GPU a process, else gloo. Returns the device of this process, or None where no launcher set
    RANK and WORLD_SIZE, or only one process runs. Does nothing the second time.

    Raises PairtuneError if the environment is incomplete or has more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PairtuneError(f"WORLD_SIZE is set but {missing[0]} is not; start the processes with torchrun")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    on_gpu = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise PairtuneError(
            f"process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            "start fewer processes"
        )
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        # NCCL is told its GPU: else it guesses from the rank, which is wrong where a machine's first rank is not 0.
        device_id = torch.device("cuda", local_rank) if on_gpu else None
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device_id)
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def shutdown() -> None:
    """Leaves the process group, when all of its processes are done."""
    if _on():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if _on() else 0


def world_size() -> int:
    return dist.get_world_size() if _on() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes."""
    if _on():
        dist.barrier()


def sum_across(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; returns the tensor."""
    if _on():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(gradients: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Sums gradients over all processes, in place. Every process gives the same shapes in the same order.

    A sum and no mean: the loss of each process is already divided by the count over all of them, which is what makes
    the gradient independent of the number of processes.
    """
    if not _on():
        return
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        nbytes = gradient.numel() * gradient.element_size()
        if bucket and size + nbytes > bucket_bytes:
            _sum_bucket(bucket)
            bucket, size = [], 0
        bucket.append(gradient)
        size += nbytes
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    dist.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Gives every process the main one's tensors, in place. Every process has the same shapes in the same order."""
    if not _on():
        return
    for tensor in tensors:
        whole = tensor.detach().contiguous()  # the tensor itself, unless it is strided
        dist.broadcast(whole, src=0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


def gather_objects(value: Any) -> list[Any]:
    """The JSON value of every process, in order of rank, on every process. JSON, so that nothing is ever unpickled."""
    if not _on():
        return [value]
    return [json.loads(part) for part in _gather_bytes(json.dumps(value).encode())]


def gather_tensors(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The named tensors of every process, in order of rank, on every process and on the CPU."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if not _on():
        return [tensors]
    return [load(part) for part in _gather_bytes(save(tensors))]


def _gather_bytes(content: bytes) -> list[bytes]:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    counts = [int(size) for size in sizes]
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count].cpu().numpy().tobytes() for part, count in zip(parts, counts, strict=True)]


def _on() -> bool:
    return dist.is_available() and dist.is_initialized()

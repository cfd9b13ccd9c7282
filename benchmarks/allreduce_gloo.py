"""One worker of benchmarks.allreduce under torch.distributed with its backend gloo."""

from __future__ import annotations

import os

from benchmarks import allreduce_child as child


def _measure() -> child.Result:
    """Exchanges torch tensors in place and returns the seconds of each exchange.

    Several tensors are exchanged as concurrent operations. Neither filling the tensors nor the
    barrier that follows is in the time.
    """
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        return child.missing(error)
    if not dist.is_available() or not dist.is_gloo_available():
        return child.missing("this torch has no gloo")
    task = child.task()
    # The name of this machine may resolve to another interface, or to none.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{task.cluster['worker'][0]}",
        rank=task.index,
        world_size=task.num_workers,
    )
    tensors = [torch.empty(shape) for shape in child.shapes()]

    def prepare(_: int) -> None:
        for tensor in tensors:
            tensor.fill_(1.0)
        dist.barrier()

    def exchange(_: int) -> None:
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()

    def check(number: int, _: object) -> None:
        found = {float(tensor.reshape(-1)[-1]) for tensor in tensors}
        if found != {task.num_workers}:
            raise RuntimeError(
                f"Expected {task.num_workers} in all tensors after exchange {number}, got "
                f"{sorted(found)}; look for the error first."
            )

    result = child.time_rounds(exchange, before=prepare, after=check)
    # Or else its threads may make the process abort at its end, once the others have left.
    dist.barrier()
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    child.run(_measure)

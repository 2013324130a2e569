"""CUDA graphs: a decode step that is captured once and then launched whole, as launching its kernels costs more time
than running them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Step = Callable[[], Tensor]


class Graphs:
    """Steps by their shape, each captured when it first comes and replayed from then on.

    What a step reads and writes stays where it is in memory, and it asks the device for no value. Its result is
    overwritten by the next step. If ``capture`` fails, one warning says so and steps run as they are.
    """

    def __init__(self, capture: Callable[[Step], Step]) -> None:
        self.capture = capture
        self.replays: dict[Hashable, Step] = {}

    def run(self, shape: Hashable, step: Step) -> Tensor:
        if shape not in self.replays:
            try:
                self.replays[shape] = self.capture(step)
            except RuntimeError as error:
                warnings.warn(f"CUDA graphs are not used: {error}", stacklevel=2)
                self.capture, self.replays[shape] = _as_it_is, step
        return self.replays[shape]()


def _as_it_is(step: Step) -> Step:
    return step


def step_graphs(device: torch.device) -> Graphs | None:
    """Graphs on one device, which share their memory as no two run at a time; None where the device has none."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()  # libraries allocate their workspace here, as they may not inside a graph
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = step()

        def replay() -> Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return result

        return replay

    return Graphs(capture)

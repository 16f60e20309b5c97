"""Processes that find what torchrun gives to its ranks, but start faster: forked off one that has imported all.

The store of the process group lives in the test, as torchrun's lives in torchrun.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 240  # until a test gives up
CONTEXT = multiprocessing.get_context("forkserver")
# What scripts import when they first need it too: each process would take seconds for it again.
LATE = ["networks.timm_models", "networks.torchvision_models", "torchvision.transforms.v2", "torch._dynamo"]
LATE += ["transformers.models.bert.modeling_bert", "matplotlib.backends.backend_agg"]
CONTEXT.set_forkserver_preload(["buffer", "coreset", "distill", "evaluate", "tests.unroll", *LATE])


@dataclass
class Ended:
    """How a process ended: its exit code, minus the signal that killed it, and what it printed."""

    code: int
    out: str
    err: str


class Ranks:
    """`count` processes that each run target(*arguments) and exit with what it returns.

    With one there is no process group.
    """

    def __init__(self, folder: Path, count: int, target, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        names = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(count)}
        names |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.files = [(folder / f"out_{rank}", folder / f"err_{rank}") for rank in range(count)]
        self.processes = []
        for rank in range(count):
            names |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            settings = dict(names), self.files[rank], target, arguments
            self.processes.append(CONTEXT.Process(target=_run, args=settings))
            self.processes[-1].start()

    def end(self) -> list[Ended]:
        for process in self.processes:
            process.join(SECONDS)
            if process.exitcode is None:
                process.kill()
                process.join()
        codes = [process.exitcode for process in self.processes]
        return [Ended(code, *(f.read_text() for f in files)) for code, files in zip(codes, self.files, strict=True)]


def run_ranks(folder: Path, count: int, target, *arguments) -> list[Ended]:
    return Ranks(folder, count, target, *arguments).end()


def _run(names, files, target, arguments):
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    os.environ.update(names)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server's children ignore it
    torch.set_num_threads(1)
    try:
        code = target(*arguments)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

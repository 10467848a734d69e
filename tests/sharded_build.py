"""Builds a LoRA as one of four processes under FSDP2 (the others are not there), and prints how many bytes of memory of
its own the process took at the most, and how many the base has: `sharded_build.py BASE`."""

from __future__ import annotations

import sys
import threading
import time

import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.models.llama.modeling_llama  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import lit_peft
from lit_peft.util.memory import process_memory

if __name__ == "__main__":
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    module = lit_peft.LoRA(base=sys.argv[1])
    module._device_mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    before, most, over = process_memory("RssAnon") or 0, 0, threading.Event()

    def watch() -> None:
        global most
        while not over.is_set():
            most = max(most, process_memory("RssAnon") or 0)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    module.configure_model()
    over.set()
    thread.join()
    print(most - before, sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()))

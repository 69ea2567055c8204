"""How processes find each other after torchrun has restarted them."""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch.distributed as dist


def fresh_store(patience: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """A key-value store that only the processes of this start share, the rank and the number of processes.

    torchrun keeps one TCPStore through all restarts. It still holds what the previous processes wrote, so
    gloo would read the addresses of dead processes and wait for them until its timeout. torchrun's restart
    count does not identify a start, because each node counts its own failures. So rank 0 draws a unique
    prefix, and each other process requests it under a unique key.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store, rank, size  # rank 0 has just created it
    prefix = uuid.uuid4().hex
    if rank == 0:
        waiting = set(range(1, size))
        while waiting:
            for other in list(waiting):
                if store.check([f"xverse/confirmed/{prefix}/{other}"]):
                    waiting.remove(other)
                elif store.check([f"xverse/request/{other}"]):  # a dead process's is never confirmed
                    asking = store.get(f"xverse/request/{other}").decode()
                    store.set(f"xverse/answer/{asking}", prefix)
            time.sleep(0.005)
        return dist.PrefixStore(prefix, store), rank, size
    store.set(f"xverse/request/{rank}", prefix)
    name = store.get(f"xverse/answer/{prefix}").decode()
    store.set(f"xverse/confirmed/{name}/{rank}", "")
    return dist.PrefixStore(name, store), rank, size

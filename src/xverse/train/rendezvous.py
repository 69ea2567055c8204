"""Where processes find each other after torchrun has started them again."""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch.distributed as dist


def fresh_store(patience: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """A key-value store that only the processes of this start share, the rank and the number of processes.

    torchrun keeps one TCPStore through all its restarts. What the processes before wrote is still in it, so
    gloo would read the addresses of the dead and wait for them until its timeout. The number of restarts that
    torchrun gives its processes cannot tell the starts apart: each node counts its own failures. So rank 0
    draws a name, and hands it to whoever is there now: each of the others asks under a name of its own.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store, rank, size  # rank 0 has made it just now
    mine = uuid.uuid4().hex
    if rank == 0:
        waiting = set(range(1, size))
        while waiting:
            for other in list(waiting):
                if store.check([f"xverse/thanks/{mine}/{other}"]):
                    waiting.remove(other)
                elif store.check([f"xverse/asks/{other}"]):  # maybe one that died: then nobody thanks
                    asking = store.get(f"xverse/asks/{other}").decode()
                    store.set(f"xverse/answer/{asking}", mine)
            time.sleep(0.005)
        return dist.PrefixStore(mine, store), rank, size
    store.set(f"xverse/asks/{rank}", mine)
    name = store.get(f"xverse/answer/{mine}").decode()
    store.set(f"xverse/thanks/{name}/{rank}", "")
    return dist.PrefixStore(name, store), rank, size

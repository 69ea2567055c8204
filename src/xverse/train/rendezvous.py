"""How processes find each other after torchrun has restarted them."""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch.distributed as dist

from xverse.config import UserError
from xverse.formats.weights import listed

START = datetime.timedelta(minutes=15)  # for all processes to arrive


def fresh_store(patience: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """A key-value store that only the processes of this start share, the rank and the number of processes.
    ``patience`` is that of the store afterwards. Raises UserError where processes are missing after START.

    torchrun keeps one TCPStore through all restarts. It still holds what the previous processes wrote, so
    gloo would read the addresses of dead processes and wait for them until its timeout. torchrun's restart
    count does not identify a start, because each node counts its own failures. So rank 0 draws a unique
    prefix, and each other process requests it under a unique key.
    """
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=START))
        shared = _shared(store, rank, size)
    except (dist.DistStoreError, dist.DistNetworkError) as error:  # a timeout, or a launcher that has ended
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes of this run did not find each other ({reason}); start it again"
        ) from error
    store.set_timeout(patience)
    return shared, rank, size


def _shared(store: dist.Store, rank: int, size: int) -> dist.Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store  # rank 0 has just created it
    prefix = uuid.uuid4().hex
    if rank == 0:
        waiting, deadline = set(range(1, size)), time.monotonic() + START.total_seconds()
        while waiting:
            for other in list(waiting):
                if store.check([f"xverse/confirmed/{prefix}/{other}"]):
                    waiting.remove(other)
                elif store.check([f"xverse/request/{other}"]):  # a dead process's is never confirmed
                    asking = store.get(f"xverse/request/{other}").decode()
                    store.set(f"xverse/answer/{asking}", prefix)
            if waiting and time.monotonic() > deadline:
                raise dist.DistStoreError(f"ranks {listed(map(str, sorted(waiting)))} are missing")
            time.sleep(0.005)
        return dist.PrefixStore(prefix, store)
    store.set(f"xverse/request/{rank}", prefix)
    name = store.get(f"xverse/answer/{prefix}").decode()
    store.set(f"xverse/confirmed/{name}/{rank}", "")
    return dist.PrefixStore(name, store)

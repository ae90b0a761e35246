"""A store that launchers meet at, in a process of its own: one that lives with a node goes with it."""

import signal
import sys

from torchtitan_lite.errors import UserError


def serve(host: str, port: int) -> int:
    """Serve torch's TCP store at host:port until a signal comes; returns 0. Raises UserError where it cannot."""
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    from torch.distributed import DistError, TCPStore

    try:
        store = TCPStore(host, port, is_master=True, wait_for_workers=False)
    except (DistError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--host {host} --port {port}: cannot be served: {reason}; choose another") from None
    print(f"serving at {host}:{store.port}; launchers take RDZV_ENDPOINT=THIS_HOST:{store.port}", flush=True)
    stopped = signal.sigwait(stops)
    print(f"stopped by {signal.Signals(stopped).name}", file=sys.stderr)
    return 0

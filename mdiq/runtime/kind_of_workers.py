"""Which kind of Workers a Ring has."""

from mdiq.runtime.in_process import InProcessWorkers
from mdiq.runtime.options import RingOptions
from mdiq.runtime.processes import ProcessWorkers
from mdiq.runtime.remote import RemoteWorkers


def kind_of_workers(options: RingOptions) -> type[RemoteWorkers] | type[InProcessWorkers] | type[ProcessWorkers]:
    """Return the class: for Nodes of other machines, in this process, or in processes of their own."""
    if options.remote is not None and (options.num_nodes > 1 or options.remote.standing_by):
        return RemoteWorkers
    return InProcessWorkers if options.in_process or options.num_nodes == 1 else ProcessWorkers

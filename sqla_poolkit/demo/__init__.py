"""``poolkit demo``: the same load on QueuePool and on ManagedPool, side by side."""

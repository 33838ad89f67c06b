"""The pool as a pure state machine: no I/O, no threads, no clock of its own, no SQLAlchemy."""

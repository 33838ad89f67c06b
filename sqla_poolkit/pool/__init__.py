"""SQLAlchemy's Pool on top of the state machine."""

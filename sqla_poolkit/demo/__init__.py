"""``poolkit demo``: the same load on SQLAlchemy's pool and on ours, side by side."""

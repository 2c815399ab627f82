"""Models, tuned states and adapters on the disk: found, described, fetched, added, deleted."""

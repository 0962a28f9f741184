"""A node that does not exist: profiles, physics and faults behind the real doors."""

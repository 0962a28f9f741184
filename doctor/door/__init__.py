"""The door: what the daemon serves over HTTP, to whom, and what keeps strangers from hurting it."""

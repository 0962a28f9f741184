"""Where snapshots come from: the live node, a recording, pasted evidence, or a node that does not exist."""

"""The flight recorder: every visit to disk, bounded, readable while it is written and after a crash."""

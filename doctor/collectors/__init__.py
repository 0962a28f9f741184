"""Collectors: one module a source; each reads its one source and says what it saw."""

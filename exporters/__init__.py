"""A report goes out: one module a form."""

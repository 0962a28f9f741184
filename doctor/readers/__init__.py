"""Pure parsers: bytes or text in, typed values out. No I/O, no clock; they never raise on any input."""

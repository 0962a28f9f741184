"""Lines that a terminal broke are whole again; nothing else is touched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from doctor.readers import vllm_log
from doctor.readers.wrapping import unwrapped

LOG = (
    "(EngineCore pid=31) INFO 03-04 05:06:07 [gpu_worker.py:298] Available KV cache memory: 1.71 GiB, and more is said here\n"
    "(EngineCore pid=31) ValueError: To serve at least one request with the model's max seq len (131072), (4.50 GiB KV cache is"
    " needed, which is larger than the available KV cache memory (1.71 GiB). Try less.\n"
    "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
)


def broken(text: str, width: int) -> str:
    return "\n".join(
        "\n".join(line[i : i + width] for i in range(0, max(len(line), 1), width)) for line in text.split("\n")
    )


def test_a_log_that_was_broken_at_column_80_says_what_it_said() -> None:
    whole = unwrapped(broken(LOG, 80).encode())
    reading = vllm_log.read(whole, "a.log", 0.0)
    facts = next(e.facts for e in reading.events if e.signal == "kv-cache-too-small")
    assert facts["max_model_len"] == 131072
    assert "needed_bytes" in facts


def test_lines_keep_their_numbers() -> None:
    text = broken(LOG, 80)
    whole = unwrapped(text.encode()).decode()
    assert whole.count("\n") == text.count("\n")
    last = next(n for n, line in enumerate(text.split("\n")) if line.startswith("(APIServer"))
    assert whole.split("\n")[last].startswith("(APIServer pid=7) RuntimeError: Engine core initialization failed")


def test_ranks_that_say_the_same_in_lines_of_one_length_are_not_joined() -> None:
    ranks = "".join(
        f"(Worker_TP{n} pid=3{n}) ERROR 03-04 05:06:07 [multiproc_executor.py:990] RuntimeError: out of luck\n"
        for n in range(4)
    )
    text = f"{ranks}Traceback (most recent call last):\nValueError: later\n".encode()
    assert unwrapped(text) == text


def test_a_log_with_longer_lines_than_any_terminal_is_left_alone() -> None:
    text = LOG.encode() + b"x" * 400 + b"\n"
    assert unwrapped(text) == text


@given(st.binary(max_size=2000) | st.text(max_size=2000).map(lambda text: broken(text, 61).encode()))
def test_no_line_end_is_lost_and_no_word(text: bytes) -> None:
    whole = unwrapped(text)
    assert whole.count(b"\n") == text.count(b"\n")
    assert b"".join(whole.split()) == b"".join(text.split())

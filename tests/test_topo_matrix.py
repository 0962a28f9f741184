"""Every matrix that people paste is read cell by cell."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import topo_matrix
from doctor.readers.topo_matrix import Row, TopoMatrix
from doctor.snapshot import known

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="the folder of public samples is not beside the checkout"
)

CELLS = ("NV18", "NV12", "NV8", "NV6", "NV4", "NV2", "NV1", "PIX", "PXB", "PHB", "NODE", "SYS")


def text_of(name: str) -> str:
    return (SAMPLES / name).read_text(encoding="utf-8", errors="replace")


def matrices() -> list[str]:
    names = [f"node/{p.name}" for p in sorted((SAMPLES / "node").glob("topo-m-*.txt"))]
    index = SAMPLES / "collect_env" / "index.jsonl"
    if index.is_file():
        rows = [json.loads(line) for line in index.read_text().splitlines()]
        names += [f"collect_env/{row['file']}" for row in rows if row["links"]]
    return names


def counted() -> list[tuple[str, dict[str, int]]]:
    """Return the files of which the index counts the cells right: where cells are glued its own count is short."""
    index = SAMPLES / "collect_env" / "index.jsonl"
    if not index.is_file():
        return []
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    return [(row["file"], row["links"]) for row in rows if row["links"] and row["file"] not in {"004.txt", "015.txt"}]


@needs_samples
@pytest.mark.parametrize("name", matrices())
def test_every_public_matrix_is_square_symmetric_and_read_whole(name: str) -> None:
    matrix = topo_matrix.read(text_of(name))
    assert matrix is not None
    gpus = [f"GPU{index}" for index in matrix.gpus]
    assert list(matrix.devices[: len(gpus)]) == gpus
    for row in matrix.rows:
        assert len(row.cells) == len(matrix.devices)
        assert matrix.cell(row.device, row.device) == "X"
        for device, cell in zip(matrix.devices, row.cells, strict=True):
            back = matrix.cell(device, row.device)
            assert back in {None, cell}, f"{row.device} to {device}"
    assert topo_matrix.read(topo_matrix.render(matrix)) == matrix


@needs_samples
@pytest.mark.parametrize(("name", "links"), counted())
def test_cells_are_those_that_the_index_counts(name: str, links: dict[str, int]) -> None:
    matrix = topo_matrix.read(text_of(f"collect_env/{name}"))
    assert matrix is not None
    assert dict(Counter(cell for row in matrix.rows for cell in row.cells if cell != "X")) == links


def plain_rows(name: str) -> list[list[str]]:
    """The rows of a matrix by a plain split at tabs; none where the paste has lost them, or glued cells together."""
    lines = [
        line.split("\t") for line in text_of(name).splitlines() if line.startswith(("GPU", "NIC")) and "\t" in line
    ]
    rows = [[field.strip() for field in fields] for fields in lines if fields[1].strip() in {"X", *CELLS}]
    glued = any(len(field) > 5 and field.isalpha() for fields in rows for field in fields)
    return [] if glued else rows


@needs_samples
@pytest.mark.parametrize("name", [name for name in matrices() if plain_rows(name)])
def test_a_matrix_with_its_tabs_is_read_as_a_plain_split_reads_it(name: str) -> None:
    matrix = topo_matrix.read(text_of(name))
    assert matrix is not None
    for fields in plain_rows(name):
        row = next(r for r in matrix.rows if r.device == fields[0])
        assert list(row.cells) == fields[1 : 1 + len(matrix.devices)]


def test_headers_and_cells_that_a_paste_glued_together_come_apart() -> None:
    matrix = topo_matrix.read(
        "\x1b[4mGPU0    GPU1    NIC0NIC1CPU Affinity     NUMA Affinity   GPU NUMA ID\x1b[0m\n"
        "GPU0     X      NV18    PIXSYS  0-27,112-139     0               N/A\n"
        "GPU1    NV18     X      SYSPIX  0-27,112-139     0               N/A\n"
        "NIC0    PIXSYS   X      NODE\nNIC1    SYS     PIXNODE X\n\nNIC Legend:\n\n  NIC0: mlx5_0\n  NIC1: mlx5_bond_1\n"
    )
    assert matrix is not None
    assert matrix.devices == ("GPU0", "GPU1", "NIC0", "NIC1")
    assert [row.cells for row in matrix.rows] == [
        ("X", "NV18", "PIX", "SYS"),
        ("NV18", "X", "SYS", "PIX"),
        ("PIX", "SYS", "X", "NODE"),
        ("SYS", "PIX", "NODE", "X"),
    ]
    assert matrix.rows[0].cpu_affinity == "0-27,112-139"
    assert matrix.rows[0].gpu_numa_id == "N/A"
    assert matrix.nics == {"NIC0": "mlx5_0", "NIC1": "mlx5_bond_1"}


@pytest.mark.parametrize("around", ["{}", "\x1b[4m{}\x1b[0m", "[4m{}[0m", "> {}", "  \t{}"])
def test_what_decorates_the_header_is_not_read(around: str) -> None:
    quote = "> " if around.startswith(">") else ""
    matrix = topo_matrix.read(
        around.format("GPU0\tGPU1\tCPU Affinity")
        + f"\r\n{quote}GPU0\t X \tNV18\t0-3\r\n{quote}GPU1\tNV18\t X \t0-3\r\n"
    )
    assert matrix is not None
    assert [row.cells for row in matrix.rows] == [("X", "NV18"), ("NV18", "X")]
    assert matrix.rows[0].cpu_affinity == "0-3"


def test_rows_that_a_narrow_terminal_broke_are_joined() -> None:
    matrix = topo_matrix.read("\tGPU0\tGPU1\tGPU2\nGPU0\t X \tNV4\n  NV8\nGPU1 NV4 X\n NV8\nGPU2 NV8 NV8 X\n")
    assert matrix is not None
    assert [row.cells for row in matrix.rows] == [("X", "NV4", "NV8"), ("NV4", "X", "NV8"), ("NV8", "NV8", "X")]


def test_a_row_whose_own_cell_is_not_in_its_own_column_is_not_believed() -> None:
    matrix = topo_matrix.read("  GPU0 GPU1 GPU2\nGPU0 X NV4 SYS\nGPU1 X NV4 SYS\nGPU2 SYS SYS X\n")
    assert matrix is not None
    assert [row.device for row in matrix.rows] == ["GPU0", "GPU2"]


def test_pairs_tell_links_and_the_pcie_way_and_never_both() -> None:
    matrix = topo_matrix.read("  GPU0 GPU1 GPU2\nGPU0 X NV4 SOC\nGPU1 NV4 X PHB\nGPU2 SOC PHB X\n")
    assert matrix is not None
    first, second, third = matrix.pairs({0: "GPU-a"})
    assert (first.first, first.second, first.nvlinks, known(first.ancestor)) == ("GPU-a", "index:1", 4, False)
    assert (second.second, second.nvlinks, second.ancestor) == ("index:2", 0, "SYS")
    assert third.ancestor == "PHB"


def test_a_matrix_of_another_maker_is_none() -> None:
    assert topo_matrix.read("       GPU0         GPU1\nGPU0   0            40\nGPU1   40           0\n") is None


@st.composite
def a_matrix(draw: st.DrawFn) -> TopoMatrix:
    gpus = draw(st.integers(1, 16))
    nics = draw(st.integers(0, 12))
    old = draw(st.booleans())
    devices = [f"GPU{i}" for i in range(gpus)] + [f"mlx5_{i}" if old else f"NIC{i}" for i in range(nics)]
    tail = topo_matrix.TAIL[: draw(st.integers(1, 3))]
    rows: list[Row] = []
    for number, device in enumerate(devices):
        cells = [draw(st.sampled_from(CELLS)) for _ in devices]
        cells[number] = "X"
        values = [draw(st.sampled_from(("0-23,96-119", "0-3", "1"))) for _ in tail] if device.startswith("GPU") else []
        values += [None] * (3 - len(values))
        rows.append(
            Row(
                device=device,
                cells=tuple(cells),
                cpu_affinity=values[0],
                numa_affinity=values[1],
                gpu_numa_id=values[2],
            )
        )
    legend = {} if old else {f"NIC{i}": f"mlx5_{i}" for i in range(nics)}
    return TopoMatrix(devices=tuple(devices), rows=tuple(rows), tail=tail, nics=legend)


@settings(max_examples=100, deadline=None)
@given(a_matrix())
def test_what_is_rendered_is_read_back(matrix: TopoMatrix) -> None:
    assert topo_matrix.read(topo_matrix.render(matrix)) == matrix


@settings(max_examples=100, deadline=None)
@given(a_matrix(), st.integers(2, 8))
def test_tabs_that_became_spaces_change_no_cell(matrix: TopoMatrix, spaces: int) -> None:
    read = topo_matrix.read(topo_matrix.render(matrix).replace("\t", " " * spaces))
    assert read is not None
    assert [row.cells for row in read.rows] == [row.cells for row in matrix.rows]


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="GPUNICXSYSV0123456789 \t\n:_mlx5", max_size=400))
def test_no_text_raises_and_what_is_read_can_be_rendered(text: str) -> None:
    matrix = topo_matrix.read("GPU0 GPU1\nGPU0 X NV4\n" + text)
    if matrix is not None:
        assert topo_matrix.read(topo_matrix.render(matrix)) == matrix
        matrix.pairs()
    topo_matrix.read(text)
    for start, end in topo_matrix.find(text):
        assert 0 <= start < end <= len(text)

# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and of pages in docs, docs/benchmarks and the charts from bench/results.

python -m bench.report. A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; nothing there is written by
hand, nor is anything in docs/benchmarks. tests/bench/test_bench.py fails where a table is not what the rows say, or a chart
was drawn from other rows. A ratio known to no better than 10 % is shown with its uncertainty.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import plots, savings, tables, which_precision
from bench.figures import AGAINST_AMP, KEY_FIGURES, Comparison
from bench.implementation import OURS
from bench.machines import MACHINES
from bench.rows import RESULTS, read
from bench.tables import EVERY_OP, by_case, markdown, taken
from mpkernels.runtime.resolve import Implementation, ops

ROOT = RESULTS.parent.parent
PLOTS = ROOT / "docs" / "plots"
DOCUMENTS = ("README.md", "docs/performance.md", "docs/which-precision.md", "docs/rl.md")


def main() -> int:
    rows = current_rows()
    for path, text in documents(rows):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    PLOTS.mkdir(exist_ok=True)
    for name, text in plots.drawn(charts(rows)):
        (PLOTS / name).write_text(text)
    return 0


def charts(rows: dict[str, list[dict]]) -> dict[str, tuple]:
    """{file: (its rows, how to draw it)} of every chart in docs/plots."""
    policies = read(RESULTS / "which_precision.jsonl")
    return plots.charts(rows) | which_precision.charts(policies) | savings.charts(savings.rows())


def current_rows(folder: Path = RESULTS) -> dict[str, list[dict]]:
    """{page: rows} of the machines that have files in bench/results; the rows of a case are of one file."""
    found = {}
    for page, machine in MACHINES.items():
        cases = {}
        for path in (folder / f"{name}.jsonl" for name in machine.files):
            of_file: dict[str, list[dict]] = {}
            for row in read(path) if path.exists() else ():
                of_file.setdefault(row["case"], []).append(row)
            cases |= of_file
        if cases:
            found[page] = [row for rows in cases.values() for row in rows]
    return found


def documents(rows: dict[str, list[dict]]) -> Iterable[tuple[Path, str]]:
    """(path, the text it should have)."""
    for name in DOCUMENTS:
        yield ROOT / name, filled((ROOT / name).read_text(), rows)
    for page, of_page in rows.items():
        yield ROOT / "docs" / "benchmarks" / f"{page}.md", benchmarks(page, of_page)
    yield ROOT / "docs" / "savings.md", savings.page(savings.rows())


def filled(text: str, rows: dict[str, list[dict]]) -> str:
    """The text with every table made anew; KeyError for a marker that names no table."""

    def table(match: re.Match) -> str:
        return f"<!-- bench:{match[1]} -->\n\n{TABLES[match[1]](rows)}\n\n<!-- /bench:{match[1]} -->"

    return re.sub(r"<!-- bench:([a-z ]+) -->.*?<!-- /bench:\1 -->", table, text, flags=re.S)


# ----- tables of several machines ---------------------------------------------------------------


def compared(comparisons: Iterable[Comparison], rows: dict[str, list[dict]]) -> str:
    """A column of "x faster" per CPU; a baseline that none of them has is left out."""
    pages = [page for page in rows if MACHINES[page].kind == "cpu"]
    cases = [by_case(rows[page]) for page in pages]
    found = [[c.what, c.baseline, *(c.faster(of) for of in cases)] for c in comparisons]
    return markdown(["mpkernels, x faster", "than", *(MACHINES[page].name for page in pages)], [c for c in found if any(c[2:])])


def memory(rows: dict[str, list[dict]]) -> str:
    """Peak MiB of a GPT's training step, a column per CPU; a recipe that none of them has is left out."""
    pages = [page for page in rows if MACHINES[page].kind == "cpu"]
    found = [by_case(rows[page])["training/gpt2_tiny"] for page in pages]
    cell = lambda of, name: f"{of[name]['peak_bytes'] / 2**20:.1f}" if name in of else ""
    lines = [[name, *(cell(of, name) for of in found)] for name in dict.fromkeys(name for of in found for name in of)]
    return markdown(["recipe", *(MACHINES[page].name for page in pages)], lines)


def gpt_peak(rows: dict[str, list[dict]]) -> str:
    """A sentence on the same, of the CPU that has most of it: what autocast around a converted model is for."""
    peaks = (
        {r["implementation"]: r["peak_bytes"] / 2**20 for r in of if r["case"] == "training/gpt2_tiny"} for of in rows.values()
    )
    most = max(peaks, key=lambda of: len(of.keys() & GPT_RECIPES.keys()))
    said = [f"{words} {most[name]:.1f}" if name in most else f"{words} not measured yet" for name, words in GPT_RECIPES.items()]
    return "Peak MiB of a small GPT's training step: {}; {};\n{}; {}.".format(*said)


_BF16 = f"{OURS} mixed_bfloat16"
GPT_RECIPES = {  # implementation: in words
    "torch fp32": "fp32",
    "torch autocast bf16": "torch.autocast",
    _BF16: "converted, outside of it",
    f"{_BF16} in autocast": "converted, inside it",
}


def places(rows: dict[str, list[dict]]) -> str:
    """Where and when each machine's rows were taken, a line each."""
    lines = {f"[{MACHINES[page].name}](benchmarks/{page}.md)": taken(of_page) for page, of_page in rows.items()}
    return "\n".join(f"- {link}: {where}\n  {when}" for link, (where, when) in lines.items())


def support(_: dict[str, list[dict]]) -> str:
    """device x op x backend, as the ops declare their implementations."""
    names: dict[tuple[str, ...], list[str]] = {}  # of the ops, by what the cells of their line say
    for name, op in sorted(ops.items()):
        found = {(i.backend, device): i for i in op.implementations for device in i.device_types}
        places = (("eager", "cpu"), ("native", "cpu"), ("eager", "cuda"), ("native", "cuda"), ("triton", "cuda"))
        cells = [
            "" if place not in found else "yes" if place[1] == "cpu" else on_gpu(found[place])
            for place in places
        ]  # fmt: skip
        names.setdefault(tuple(cells), []).append(f"`{name}`")
    lines = [[", ".join(of), *cells] for cells, of in names.items()]
    return markdown(["op", "CPU, torch ops", "CPU, C++", "GPU, torch ops", "GPU, CUDA C++", "GPU, Triton"], lines)


def on_gpu(implementation: Implementation) -> str:
    return f"sm{implementation.sm}" if implementation.sm else LEAST_SM[implementation.backend]


LEAST_SM = {"eager": "any", "native": "sm75+", "triton": "sm80+"}  # where an implementation is not for one architecture alone


# ----- a machine's page ---------------------------------------------------------------

SECTIONS = {  # title: (the ops it shows, a sentence on it, its table)
    "Targets": (EVERY_OP, "What the project aims at on such a device, and the worst case of each target.", tables.outcomes),
    "Roofs": (EVERY_OP, "What this machine can do at most, measured beside the cases.", tables.limits),
    "Forward": (
        ("linear_act",),
        "Shapes are M x K x N, with ReLU.",
        lambda rows: tables.ratios(rows, "linear_act", prefix="linear_act/forward/"),
    ),
    "Backward": (
        ("linear_act",),
        "All three gradients. The graph is kept, so baselines on fp32 copies keep theirs from forward; ours casts again.",
        lambda rows: tables.ratios(rows, "linear_act", prefix="linear_act/backward/"),
    ),
    "Forward and backward": (("linear_act",), "", lambda rows: tables.ratios(rows, "linear_act", prefix="linear_act/both/")),
    "Chains": (("mlp",), "Four layers, forward and backward, fp32 parameters.", lambda rows: tables.ratios(rows, "mlp")),
    "Eight bits": (
        ("quantize", "float8"),
        "A matrix quantized by rows; the product of e4m3 operands; forward and backward of a layer of `mixed_float8`.\n"
        "The roof of a product is that of bf16.",
        lambda rows: tables.ratios(rows, "quantize", "float8"),
    ),
    "Optimizer step": (
        ("step",),
        "`scaler.step(opt)` and `scaler.update()` together, the launch overhead of every tensor included.",
        lambda rows: tables.ratios(rows, "step"),
    ),
    "Bytes of the optimizer step": (("step",), "", tables.bytes_per_parameter),
    "Training steps": (
        ("training",),
        'Forward, loss, backward and update. `mpkernels` is `convert(model, "mixed_float16")` with our AdamW and scaler.',
        tables.training,
    ),
    "Per call": (
        ("overhead",),
        "CPU launch overhead: calls on tiny tensors, steps of tensors of 16 elements, the first training step of a process.",
        tables.overhead,
    ),
    "Left out": (EVERY_OP, "", tables.left_out),
    "Numerics": (
        ("linear_act", "step"),
        "The worst of each over its cases, against fp64 on the same rounded inputs; 1 is one rounding of the exact result.",
        tables.numerics,
    ),
}


def benchmarks(page: str, rows: list[dict]) -> str:
    """docs/benchmarks/<page>.md: every section that has rows, and the charts."""
    machine = MACHINES[page]
    head = (
        *taken(rows),
        "How rows are taken, and what each baseline is: [methodology](../methodology.md).",
        "Ratios are our time over theirs: below 1, mpkernels is faster.",
    )
    written = "<!-- Written by python -m bench.report: change that, not this. -->"
    parts = [written, f"# {machine.name}", "\n".join(head), machine.note]
    for title, (of_ops, sentence, table) in SECTIONS.items():
        if any(row["op"] in of_ops for row in rows):
            parts += [f"## {title}", sentence, table(rows)]
    charts = [f"![{name.replace('_', ' ')}](../plots/{page}_{name}.svg)" for name in plots.chosen_rows(rows, machine.kind)]
    return "\n\n".join(part for part in (*parts, *(["## Charts", *charts] if charts else ())) if part) + "\n"


TABLES = {
    "against amp": lambda rows: compared(AGAINST_AMP, rows),
    "gpt peak": gpt_peak,
    "key figures": lambda rows: compared(KEY_FIGURES, rows),
    "memory": memory,
    "places": places,
    "policies": lambda _: which_precision.table(read(RESULTS / "which_precision.jsonl")),
    "policies place": lambda _: savings.place(read(RESULTS / "which_precision.jsonl")),
    "precision": lambda _: tables.goals(read(RESULTS / "precision.jsonl")),
    "same bits": lambda _: savings.same_bits(savings.rows()),
    "support": support,
}

if __name__ == "__main__":
    sys.exit(main())

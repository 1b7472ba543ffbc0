"""What the benchmarks share: the machine's description, pinning, alternating timing, tables and result files."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

BUSY_LOAD = 0.5
_PACKAGES = ("probquant", "torch", "onnxruntime", "openvino", "onnx", "torchao", "numpy")
_ALLOWED = sorted(os.sched_getaffinity(0))  # before anything is pinned


class Skip(Exception):
    """A contestant that cannot take part, with the reason."""


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def cpu_facts() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    return facts


def cache_bytes() -> dict[int, int]:
    """Bytes of the data caches that the first CPU sees, by level."""
    sizes = {}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if (entry / "type").read_text().strip() != "Instruction":
                text = (entry / "size").read_text().strip()
                sizes[int((entry / "level").read_text())] = int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)
    return sizes


def compiled(source: Path, *options: str, reads: Sequence[Path] = ()) -> Path:
    """A shared library of a C++ file, made by the system's compiler ($CXX, c++, g++ or clang++) and kept in the user's cache folder
    until the file, the command or one of the headers that it `reads` changes."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "")]
    if not compiler[0]:
        raise SystemExit(f"{source.name} needs a C++ compiler: install one, or name it in CXX")
    command = [*compiler, "-std=c++17", "-fPIC", "-shared", str(source), *options]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *reads)) + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probquant-benchmarks"
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{source.stem}-{key}.{os.getpid()}"
        subprocess.run([*command, "-o", str(temporary)], check=True)
        os.replace(temporary, library)
    return library


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    import torch  # not at the top: peak.py does without it

    found["torch"] = torch.__version__  # with the build's suffix, which the package's metadata may lack
    return found


def command_line(arguments: Iterable[str]) -> str:
    """As a shell takes it, behind the variables that say how much of the instruction set a contestant may use."""
    names = ("PROBQUANT_ISA", "ONEDNN_MAX_CPU_ISA", "FBGEMM_ENABLE_INSTRUCTIONS")
    return " ".join([*(f"{name}={os.environ[name]}" for name in names if name in os.environ), shlex.join(arguments)])


def describe_run() -> dict:
    """The circumstances of a run: machine, versions, date, load. Taken at its start; goes into the context file."""
    facts, caches = cpu_facts(), cache_bytes()
    run = {
        "command": command_line(Path(argument).name if os.sep in argument else argument for argument in sys.argv),  # folders are nobody's business
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": facts.get("model name", platform.processor()),
        "cpu_family_model": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "cpus": len(_ALLOWED),
        "caches": ", ".join(f"L{level} {size >> 10} KiB" for level, size in sorted(caches.items())),
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }
    with contextlib.suppress(ImportError):
        import probquant

        run["probquant_isa"] = probquant.cpu_info()["isa_used"]
    return run


def print_run(run: dict) -> None:
    print(f"{run['cpu']} (family/model {run['cpu_family_model']}), {run['cpus']} CPUs, {run['caches']}; {run['date']}")
    print(", ".join(f"{name} {version}" for name, version in run["versions"].items()), end="")
    print(f"; probquant runs {run['probquant_isa']}" if "probquant_isa" in run else "")
    print(f"load average {run['load_at_start']}")
    if run["load_at_start"] > BUSY_LOAD:
        print(f"WARNING: the machine is busy (load average above {BUSY_LOAD}): times will be noise. Run again when it is idle.")


def available_cpus() -> int:
    return len(_ALLOWED)


def pin(threads: int) -> None:
    """Lets the calling thread, and the threads it starts from now on, use the first `threads` CPUs only."""
    if threads > len(_ALLOWED):
        raise SystemExit(f"--threads {threads}: this process may use {len(_ALLOWED)} CPUs")
    os.sched_setaffinity(0, _ALLOWED[:threads])


def keep_heap() -> None:
    """Has malloc keep what is freed (glibc; elsewhere nothing changes).

    Left to itself, glibc returns large blocks to the system at once, and every call that allocates its output pays a page
    fault per 4 KiB of it: up to half of a fast layer's time, and none of its work.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the largest allowed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 << 20)  # M_TOP_PAD


# ----------------------------------------------------------------------------------------------------------------------
# Timing


def alternate(calls: dict[str, Callable[[], object]], rounds: int, threads: int, turn_ms: float = 3.0, on_round=None) -> dict[str, list[float]]:
    """Times every call in turn, `rounds` times over; microseconds of each single call.

    A turn is one untimed call and then as many timed ones as fit into turn_ms (at least one), so that each contestant
    has its own data in the caches. The order changes from round to round. With several threads a short sleep lets the
    workers of the contestant before stop spinning.
    """
    fit = {}
    for name, call in calls.items():
        call()
        fit[name] = max(1, min(1000, int(1e3 * turn_ms / min(_once(call) for _ in range(2)))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if threads > 1:
                time.sleep(0.004)
            call = calls[name]
            call()
            samples[name] += [_once(call) for _ in range(fit[name])]
        if on_round:
            on_round()
    return samples


def paired_ratios(a: Callable[[], object], b: Callable[[], object], pairs: int) -> list[float]:
    """Time of `a` over time of `b`, call by call alternated; which one goes first alternates, too."""
    a(), b()
    ratios = []
    for i in range(pairs):
        if i % 2:
            time_b, time_a = _once(b), _once(a)
        else:
            time_a, time_b = _once(a), _once(b)
        ratios.append(time_a / time_b)
    return ratios


def times_over(models: dict[str, Callable], base: Callable, x, pairs: int) -> dict[str, float]:
    """Each model's time over that of `base` on x: the median of alternated pairs of calls."""
    return {name: ratio_summary(paired_ratios(lambda model=model: model(x), lambda: base(x), pairs))["median"] for name, model in models.items()}


_clock = time.perf_counter_ns


def add_clock_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time of the process, which other programs disturb less; for one thread only (default: %(default)s)",
    )


def use_clock(name: str, threads: Sequence[int]) -> None:
    global _clock
    if name == "cpu" and max(threads) > 1:
        raise SystemExit("--clock cpu is for --threads 1: it adds up the time of all threads")
    _clock = time.process_time_ns if name == "cpu" else time.perf_counter_ns


def _once(call: Callable[[], object]) -> float:
    start = _clock()
    call()
    return max((_clock() - start) * 1e-3, 1e-3)


def ratio_summary(ratios: Sequence[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"pairs": len(ratios), "median": round(quartiles[1], 4), "quartile1": round(quartiles[0], 4), "quartile3": round(quartiles[2], 4)}


# ----------------------------------------------------------------------------------------------------------------------
# Tables and files


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Aligned columns, the first `left` of them to the left."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    lines = [header, ["---" if i < left else "---:" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def context_path(path: str | os.PathLike) -> Path:
    """Where the circumstances of the results in `path` stand: layers.json -> layers.run.json."""
    path = Path(path)
    return path.with_name(f"{path.stem}.run.json")


def write_results(path: str | os.PathLike | None, rows: list[dict], context: dict) -> None:
    """Writes the rows to `path`, one per line, and the circumstances beside them. Does nothing for None."""
    if path is None:
        return
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    _replace(Path(path), text)
    _replace(context_path(path), json.dumps(context, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    _replace(path, text)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def run_per_thread_count(script: str, argv: Sequence[str], threads: Sequence[int], out: str | None, key: str) -> None:
    """Runs a script again for each thread count in a process of its own, and puts the results together.

    Runtimes learn how many CPUs they have when they start; none could take part in a run with more after one with fewer.
    """
    rest, skipping = [], False
    for argument in argv:
        if argument.startswith("-"):
            skipping = argument.split("=")[0] in ("--threads", "--json")
        if not skipping:
            rest.append(argument)
    rows: list[dict] = []
    context: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in threads:
            part = Path(folder) / f"{count}.json"
            subprocess.run([sys.executable, script, *rest, "--threads", str(count), "--json", str(part)], check=True)
            rows += json.loads(part.read_text())
            run = json.loads(context_path(part).read_text())
            context = {**context, **run, key: context.get(key, []) + run[key]} if context else run
            context["command"] = command_line([Path(script).name, *rest, "--threads", *map(str, threads)])
            write_results(out, rows, context)


def check_names(chosen: Sequence[str] | None, known: Sequence[str], default: Sequence[str], what: str) -> list[str]:
    """The chosen names; a name stands for every known one that starts with it. Ends the program for an unknown one."""
    if not chosen:
        return list(default)
    picked = []
    for name in chosen:
        matches = [k for k in known if k == name] or [k for k in known if k.startswith(name)]
        if not matches:
            raise SystemExit(f"unknown {what} {name!r}; there are: {', '.join(known)}")
        picked += [m for m in matches if m not in picked]
    return picked

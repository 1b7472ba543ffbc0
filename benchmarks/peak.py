"""What this machine can do at best: multiply-accumulates by instruction and bandwidth by memory level, 1 to N threads.

Compiles peak.cpp with the system's C++ compiler ($CXX, c++, g++ or clang++) and keeps the library in the user's cache folder.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import sys
from pathlib import Path

from tqdm import tqdm

from common import available_cpus, cache_bytes, compiled, cpu_facts, describe_run, pin, print_run, text_table, write_results

KINDS = {
    "amx_tile": "int8 product of tiles, 16 x 16 x 64 (tdpbusd)",
    "vnni_zmm": "int8 dot product, 512 bit (vpdpbusd)",
    "vnni_ymm": "int8 dot product, 256 bit (vpdpbusd)",
    "int16_ymm": "AVX2, int16 (vpmaddwd + vpaddd)",
    "int8_ymm": "AVX2, int8, saturates (vpmaddubsw + ...)",
    "bf16_zmm": "bfloat16 dot product, 512 bit",
    "fma_zmm": "float32 FMA, 512 bit",
    "fma_ymm": "float32 FMA, 256 bit",
}


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = compiled(Path(__file__).with_name("peak.cpp"), "-O3", "-pthread", "-Wno-psabi")
    loaded = ctypes.CDLL(str(library))
    loaded.probquant_peak_macs.restype = loaded.probquant_peak_bytes.restype = ctypes.c_double
    loaded.probquant_peak_macs.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_double]
    loaded.probquant_peak_bytes.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double]
    return loaded


def probe_gmacs(kind: str, threads: int = 1, seconds: float = 0.02) -> float | None:
    """Most 10^9 multiply-accumulates per second that an instruction does; None if this CPU lacks it."""
    rate = _library().probquant_peak_macs(kind.encode(), cpu_facts().get("flags", "").encode(), threads, seconds)
    return rate / 1e9 if rate > 0 else None


def probe_vnni_gmacs(threads: int = 1, seconds: float = 0.02) -> float:
    """The int8 peak of the widest vector instruction there is, in 10^9 multiply-accumulates per second."""
    return next((rate for rate in (probe_gmacs(kind, threads, seconds) for kind in ("vnni_zmm", "vnni_ymm", "int16_ymm")) if rate), float("nan"))


def probe_amx_gmacs(threads: int = 1, seconds: float = 0.02) -> float:
    """The int8 peak of AMX, in 10^9 multiply-accumulates per second."""
    return probe_gmacs("amx_tile", threads, seconds) or float("nan")


def probe_avx2_gmacs(threads: int = 1, seconds: float = 0.02) -> float:
    """The peak of exact int8 products under AVX2, which needs 16-bit multiplication."""
    return probe_gmacs("int16_ymm", threads, seconds) or float("nan")


def probe_bandwidth(mode: str, bytes_per_thread: int, threads: int = 1, seconds: float = 0.05) -> float:
    """GB/s of reading, writing, writing past the caches ("stream") or copying buffers of that size."""
    return _library().probquant_peak_bytes(mode.encode(), bytes_per_thread, threads, seconds) / 1e9


def memory_levels(threads: int) -> dict[str, int]:
    """Bytes per thread that stay in each level of the memory hierarchy."""
    caches = cache_bytes() or {1: 32 << 10, 2: 1 << 20, 3: 16 << 20}
    last = caches[max(caches)]
    levels = {f"L{level}": size // 2 for level, size in sorted(caches.items()) if level < max(caches)}
    levels[f"L{max(caches)}"] = max(last // (2 * threads), 2 * max(levels.values(), default=0))
    levels["DRAM"] = min(4 * last, 256 << 20)
    return levels


def modes(level: str) -> list[str]:
    """What is measured at a level of the memory hierarchy; stores past the caches go to DRAM only."""
    return ["read", "write", *(["stream"] if level == "DRAM" else []), "copy"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="example: python benchmarks/peak.py --json peak.json"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default: 1 and all CPUs)")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for every figure (default: %(default)s)")
    parser.add_argument("--json", metavar="OUT", help="write the figures as a list of rows {what, level, threads, value, unit}")
    args = parser.parse_args(argv)
    run = describe_run()
    print_run(run)
    counts = args.threads or sorted({1, available_cpus()})
    pin(max(counts))
    rows = []
    levels = {threads: memory_levels(threads) for threads in counts}
    with tqdm(total=len(counts) * len(KINDS) + sum(len(modes(level)) for sizes in levels.values() for level in sizes), leave=False) as bar:
        for threads in counts:
            pin(threads)
            for kind in KINDS:
                rate = probe_gmacs(kind, threads, args.seconds)
                if rate:
                    rows.append({"what": kind, "level": "", "threads": threads, "value": round(rate, 1), "unit": "GMAC/s"})
                bar.update()
            for level, size in levels[threads].items():
                for mode in modes(level):
                    rate = probe_bandwidth(mode, size, threads, args.seconds * (4 if level == "DRAM" else 1))
                    rows.append({"what": mode, "level": level, "threads": threads, "value": round(rate, 1), "unit": "GB/s"})
                    bar.update()
    value = {(row["what"], row["level"], row["threads"]): row["value"] for row in rows}
    names = [f"{threads} thread{'s' * (threads > 1)}" for threads in counts]
    table = [[text, *(value.get((kind, "", threads), "-") for threads in counts)] for kind, text in KINDS.items()]
    print("\n" + text_table(["GMAC/s", *names], table))
    table = [[level, mode, *(value[mode, level, threads] for threads in counts)] for level in levels[counts[0]] for mode in modes(level)]
    print("\n" + text_table(["GB/s", "", *names], table, left=2))
    write_results(args.json, rows, run)


if __name__ == "__main__":
    sys.exit(main())
